"""What is said about the demo's scenes, in Chinese and in English: captions, questions with their answers, and changes.

Both languages have the same tables of templates and the same few rules of grammar. A question's language is its answer's. For
a scene and a question there is one right answer, so that answers can be compared word by word.
"""

import re
from functools import partial

from dataset.records import CAPTION_PROMPT
from model.errors import BadInput

from .scenes import COLOURS, PLACES, SHAPES, SIZES, UNSEEN_PAIRS, Thing, free_places, only, split_of

FIELDS = {"place": PLACES, "size": SIZES, "colour": COLOURS, "shape": SHAPES}
KEYS = [*PLACES, *SIZES, *COLOURS, *SHAPES]  # a thing's words, which are English


class Chinese:
    """Words and grammar of Chinese, which has neither plurals nor articles."""

    words = "左上角 上方 右上角 左边 中间 右边 左下角 下方 右下角 大 小 红色 橙色 黄色 绿色 青色 蓝色 紫色 黑色 圆形 方形 三角形 星形 十字形 圆环"
    words = dict(zip(KEYS, words.split(), strict=True))
    # what else people call them; answers don't
    synonyms = {
        "圆形": ["圆", "圆圈"],
        "方形": ["正方形", "方块"],
        "三角形": ["三角"],
        "星形": ["星星", "五角星"],
        "十字形": ["十字"],
    }
    numbers = ["零", "一", "两", "三", "四"]
    nothing = "空"
    glue = ""  # between words
    punctuation = "，；。"

    questions = {
        "colour": [
            "{subject}是什么颜色的？",
            "{subject}是什么颜色？",
            "{subject}的颜色是什么？",
            "{subject}什么颜色？",
        ],
        "shape": ["{subject}是什么形状的？", "{subject}是什么形状？", "{subject}的形状是什么？"],
        "size": ["{subject}是大的还是小的？", "{subject}有多大？", "{subject}大不大？"],
        "where": ["{subject}在哪里？", "{subject}在什么位置？", "{subject}在图中的哪里？", "{subject}在哪？"],
        "count": [
            "有几个{things}？",
            "图中一共有多少个{things}？",
            "图中有几个{things}？",
            "图里有几个{things}？",
            "有多少{things}？",
        ],
        "exist": ["有{thing}吗？", "图中有没有{thing}？", "图中有{thing}吗？", "图里有{thing}吗？", "有没有{thing}？"],
        "caption": [
            CAPTION_PROMPT,
            "图中有什么？",
            "图里有什么？",
            "图里画了什么？",
            "画了什么？",
            "有什么？",
            "这是什么？",
            "你看到了什么？",
            "图中有哪些图形？",
            "请描述这张图片。",
            "描述一下这张图。",
            "请说明画面内容。",
            "看图说话。",
        ],
        "change": ["两张图有什么不同？", "第二张图有什么变化？"],
        "animation": ["动画里有什么变化？", "先后有什么不同？"],
        "other": [
            "这是什么动物？",
            "图中有几个人？",
            "这是在哪里拍的？",
            "天气怎么样？",
            "这张图是谁画的？",
            "图中的人在做什么？",
            "有没有猫？",
            "这是什么车？",
            "你好",
            "谢谢",
            "你是谁？",
            "你会什么？",
            "今天星期几？",
        ],
    }
    short_questions = {
        "colour": ["{place}是什么颜色？"],
        "shape": ["{place}是什么？", "{place}是什么形状？"],
        "size": [],
    }
    # of questions and of requests
    openings = {"？": ["请问，", "请问", "你好，", "请告诉我，"], "。": ["你好，"]}
    answers = {
        "colour": "{subject}是{colour}的。",
        "shape": "{subject}是{shape}。",
        "size": "{subject}是{size}的。",
        "where": "{subject}在{place}。",
        "empty": "{place}没有图形。",
        "absent": "图中没有{thing}。",
        "yes": "有，图中有{thing}。",
        "no": "没有，图中没有{thing}。",
        "other": "图里只有彩色的图形。",
        "recolour": "{subject}变成了{colour}。",
        "reshape": "{subject}变成了{shape}。",
        "move": "{subject}移到了{place}。",
        "remove": "{subject}不见了。",
        "add": "{place}多了一个{thing}。",
    }
    bigger_or_smaller = {"big": "{subject}变大了。", "small": "{subject}变小了。"}

    def noun(self, colour=None, size=None, shape=None):
        """As in 红色的大星形, 红色的图形, 星形."""
        colour = f"{self.words[colour]}的" if colour else ""
        return f"{colour}{self.words.get(size, '')}{self.words.get(shape, '图形')}"

    nouns = noun  # no plural

    def a(self, noun):
        return noun

    def the(self, noun):
        return noun

    def at(self, place):
        return self.words[place]

    def the_thing_at(self, place):
        return f"{self.words[place]}的图形"

    def count(self, number, **words):
        return f"图中有{self.numbers[number]}个{self.noun(**words)}。" if number else f"图中没有{self.noun(**words)}。"

    def caption(self, scene):
        """As in 左上角有一个红色的大星形，中间有一个黑色的小三角形。"""
        parts = [f"{self.at(t.place)}有一个{self.noun(t.colour, t.size, t.shape)}" for t in scene]
        return "，".join(parts) + "。"

    def sentence(self, text):
        return text

    def as_typed(self, question, rng):
        """The question as somebody might type it."""
        if rng.random() < 0.15:
            words = "|".join(self.synonyms)
            question = re.sub(words, lambda match: rng.choice(self.synonyms[match[0]]), question)
        if question[-1] in self.openings and rng.random() < 0.15:
            question = rng.choice(self.openings[question[-1]]) + question
        return question.rstrip("？。") if rng.random() < 0.1 else question


class English:
    """Words and grammar of English."""

    words = {word: word for word in KEYS}
    numbers = ["no", "one", "two", "three", "four"]
    nothing = " nothing"
    glue = " "
    punctuation = ",;."

    questions = {
        "colour": ["What colour is {subject}?", "Which colour is {subject}?", "What is the colour of {subject}?"],
        "shape": ["What shape is {subject}?", "What is {subject}?"],
        "size": ["Is {subject} big or small?", "How big is {subject}?", "What size is {subject}?"],
        "where": ["Where is {subject}?", "Where in the picture is {subject}?", "In which place is {subject}?"],
        "count": [
            "How many {things} are there?",
            "How many {things} are in the picture?",
            "How many {things} can you see?",
            "How many {things}?",
        ],
        "exist": [
            "Is there {thing}?",
            "Is there {thing} in the picture?",
            "Can you see {thing}?",
            "Do you see {thing}?",
        ],
        "caption": [
            "Describe the picture.",
            "Describe it.",
            "What is in the picture?",
            "What is in this image?",
            "What is this?",
            "What is there?",
            "What do you see?",
            "What does the picture show?",
            "Which shapes are there?",
            "Please describe this image.",
        ],
        "change": ["What is different in the second picture?", "What has changed?"],
        "animation": ["What happens in the animation?", "What changes?"],
        "other": [
            "What animal is this?",
            "How many people are there?",
            "Where was this taken?",
            "What is the weather like?",
            "Who painted this?",
            "What is the man doing?",
            "Is there a cat?",
            "What kind of car is this?",
            "Hello",
            "Hi!",
            "Thank you",
            "Who are you?",
            "What can you do?",
            "Help",
        ],
    }
    short_questions = {
        "colour": ["What colour is it {place}?"],
        "shape": ["What is {place}?", "Which shape is {place}?", "What shape is {place}?"],
        "size": [],
    }
    # of questions and of requests
    openings = {"?": ["Please tell me: ", "Hello! ", "Tell me: ", "Look: "], ".": ["Hello! "]}
    answers = {
        "colour": "{subject} is {colour}.",
        "shape": "{subject} is {a_shape}.",
        "size": "{subject} is {size}.",
        "where": "{subject} is {place}.",
        "empty": "there is no shape {place}.",
        "absent": "there is no {thing}.",
        "yes": "yes, there is {thing}.",
        "no": "no, there is no {bare_thing}.",
        "other": "I only see coloured shapes.",
        "recolour": "{subject} turned {colour}.",
        "reshape": "{subject} turned into {a_shape}.",
        "move": "{subject} moved to the {bare_place}.",
        "remove": "{subject} is gone.",
        "add": "{thing} appeared {place}.",
    }
    bigger_or_smaller = {"big": "{subject} got bigger.", "small": "{subject} got smaller."}

    def noun(self, colour=None, size=None, shape=None):
        """As in big red star, red shape, star."""
        return " ".join([*(self.words[word] for word in (size, colour) if word), self.words.get(shape, "shape")])

    def nouns(self, **words):
        noun = self.noun(**words)
        return f"{noun}es" if noun.endswith("s") else f"{noun}s"

    def a(self, noun):
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"

    def the(self, noun):
        return f"the {noun}"

    def at(self, place):
        before = {"left": "on", "right": "on", "middle": "in"}.get(place, "at")
        return f"{before} the {place}"

    def the_thing_at(self, place):
        return f"the shape {self.at(place)}"

    def count(self, number, **words):
        if number == 1:
            return f"there is one {self.noun(**words)}."
        return f"there are {self.numbers[number]} {self.nouns(**words)}."

    def caption(self, scene):
        """As in There is a big red star at the top left and a small black triangle in the middle."""
        parts = [f"{self.a(self.noun(t.colour, t.size, t.shape))} {self.at(t.place)}" for t in scene]
        first = ", ".join(parts[:-1])
        return f"There is {first} and {parts[-1]}." if first else f"There is {parts[-1]}."

    def sentence(self, text):
        """With a capital letter."""
        return text[0].upper() + text[1:]

    def as_typed(self, question, rng):
        """The question as somebody might type it."""
        if question[-1] in self.openings and rng.random() < 0.15:
            question = rng.choice(self.openings[question[-1]]) + question
        question = question.replace("colour", "color") if rng.random() < 0.2 else question
        question = question.rstrip("?.") if rng.random() < 0.1 else question
        return question.lower() if rng.random() < 0.1 else question


LANGUAGES = {"zh": Chinese(), "en": English()}


# --- about one scene ------------------------------------------------------------------------------------------------


def subjects(language, scene, thing, without):
    """Ways to name a thing, (by what, the words), that mean no other thing of the scene and don't use the field `without`."""
    words = {"place": thing.place, "colour": thing.colour, "shape": thing.shape}
    ways = [] if without == "place" else [("place", language.the_thing_at(thing.place))]
    for fields in (["colour"], ["shape"], ["colour", "shape"]):
        chosen = {field: words[field] for field in fields}
        if without not in fields and len(only(scene, **chosen)) == 1:
            ways.append((" ".join(fields), language.the(language.noun(**chosen))))
    return ways


def values(language, thing):
    """A thing's words, as templates of answers take them."""
    words = {field: language.words[getattr(thing, field)] for field in ("colour", "size", "shape")}
    noun = language.noun(thing.colour, thing.size, thing.shape)
    return {
        **words,
        "a_shape": language.a(words["shape"]),
        "place": language.at(thing.place),
        "bare_place": language.words[thing.place],
        "thing": language.a(noun),
        "subject": language.the_thing_at(thing.place),
    }


def absent(language, scene, rng, without):
    """(the name of a thing that isn't there, the answer that says so); named by colour or shape, but not by `without`."""
    field = rng.choice([field for field in ("colour", "shape") if field != without])
    noun = language.noun(**{field: rng.choice([word for word in FIELDS[field] if not only(scene, **{field: word})])})
    return language.the(noun), language.answers["absent"].format(thing=noun)


def ask_property(kind, language, scene, rng):
    """What colour, shape or size a thing has; now and then about a place that is empty, or a thing that isn't there."""
    if rng.random() < 1 / 12:
        subject, answer = absent(language, scene, rng, without=kind)
        return rng.choice(language.questions[kind]).format(subject=subject), answer
    if rng.random() < 1 / 12:
        thing = Thing(rng.choice(free_places(scene)), *scene[0][1:])
        by, subject = "place", language.the_thing_at(thing.place)
        answer = language.answers["empty"]
    else:
        thing = rng.choice(scene)
        by, subject = rng.choice(subjects(language, scene, thing, without=kind))
        answer = language.answers[kind]
    templates = language.questions[kind]
    if by == "place":
        # English has another way to ask for the shape at a place than "what shape is the shape at"
        short = language.short_questions[kind]
        templates = short if kind == "shape" else templates + short
    question = rng.choice(templates).format(subject=subject, place=language.at(thing.place))
    return question, answer.format(**{**values(language, thing), "subject": subject})


def ask_where(language, scene, rng):
    """Where a thing is; now and then one that isn't there."""
    if rng.random() < 1 / 12:
        subject, answer = absent(language, scene, rng, without="place")
        return rng.choice(language.questions["where"]).format(subject=subject), answer
    thing = rng.choice(scene)
    ways = subjects(language, scene, thing, without="place")
    if not ways:
        return None
    _, subject = rng.choice(ways)
    answer = language.answers["where"].format(**{**values(language, thing), "subject": subject})
    return rng.choice(language.questions["where"]).format(subject=subject), answer


def ask_count(language, scene, rng):
    """How many shapes there are, of a size, a colour or a kind; one time in twelve of a colour that isn't there."""
    thing = rng.choice(scene)
    words = rng.choice([{}, {"size": thing.size}, {"colour": thing.colour}, {"shape": thing.shape}])
    if rng.random() < 1 / 12:
        words = {"colour": rng.choice([colour for colour in COLOURS if not only(scene, colour=colour)])}
    question = rng.choice(language.questions["count"]).format(things=language.nouns(**words))
    return question, language.count(len(only(scene, **words)), **words)


def ask_exist(language, scene, rng):
    """Yes as often as no; what is not there differs by one word from something that is."""
    thing, wanted = rng.choice(scene), rng.random() < 0.5
    # for a no, change a word until nothing in the scene matches. A pair that training never shows isn't asked for there: the
    # answer would always be no
    while True:
        colour, shape = thing.colour, thing.shape
        if not wanted:
            colour, shape = rng.choice([(rng.choice(COLOURS), shape), (colour, rng.choice(SHAPES))])
        words = rng.choice([{"colour": colour, "shape": shape}, {"colour": colour}, {"shape": shape}])
        never_shown = len(words) == 2 and (colour, shape) in UNSEEN_PAIRS and split_of(scene) != "unseen"
        if bool(only(scene, **words)) == wanted and not never_shown:
            break
    noun = language.noun(**words)
    question = rng.choice(language.questions["exist"]).format(thing=language.a(noun))
    return question, language.answers["yes" if wanted else "no"].format(thing=language.a(noun), bare_thing=noun)


def ask_caption(language, scene, rng):
    return rng.choice(language.questions["caption"]), language.caption(scene)


def ask_other(language, scene, rng):
    """Something that no scene shows."""
    return rng.choice(language.questions["other"]), language.answers["other"]


QUESTIONS = {kind: partial(ask_property, kind) for kind in ("colour", "shape", "size")}
QUESTIONS |= {"where": ask_where, "count": ask_count, "exist": ask_exist, "caption": ask_caption, "other": ask_other}


def question(language, scene, rng, kind):
    """(a question of this kind, its answer), or None if the scene allows none."""
    asked = QUESTIONS[kind](language, scene, rng)
    return asked and (language.as_typed(asked[0], rng), language.sentence(asked[1]))


def questions(scene, rng, count, nameless=None, languages=LANGUAGES):
    """`count` different (question, answer) pairs, of random kinds and languages; few about what isn't shown.

    nameless: "colour" or "shape" if neither questions nor answers may name one.
    """
    weights = {kind: 0.2 if kind == "other" else 1 for kind in QUESTIONS}
    if nameless:  # asked for what has no name, only denials would be left; a caption names everything
        weights |= {"other": 0.1, "caption": 0, nameless: 0}
    answers = {}
    while len(answers) < count:
        language = rng.choice(list(languages.values()))
        pair = question(language, scene, rng, rng.choices(list(weights), weights.values())[0])
        if pair and not (nameless and names(languages, pair, nameless)):
            answers.setdefault(*pair)
    return list(answers.items())


def names(languages, texts, field):
    """Whether texts have a word of this field, "colour" or "shape", in any of these languages."""
    words = "|".join(language.words[key] for language in languages.values() for key in FIELDS[field])
    return any(re.search(rf"(?<![a-z])({words})", text) for text in texts)  # red, but not coloured


# --- about changes --------------------------------------------------------------------------------------------------


def change_in_words(language, change):
    """As in 左上角的图形变成了红色。 or The shape at the top left turned red."""
    template = language.bigger_or_smaller[change.new.size] if change.kind == "resize" else language.answers[change.kind]
    named = language.the_thing_at((change.old or change.new).place)
    return language.sentence(template.format(**{**values(language, change.new or change.old), "subject": named}))


# --- a scene in words -----------------------------------------------------------------------------------------------


def scene_in_words(language, scene, rng, form):
    """The scene as text: what the language model reads where a picture will be later."""
    comma, semicolon, stop = language.punctuation
    glue = language.glue

    def join(words):
        return glue.join(language.words[word] for word in words)

    if form == "caption":
        return language.caption(scene)
    if form == "pairs":  # two words of a thing at a time
        pairs = [join((a, b)) for thing in scene for a in thing for b in thing if a != b]
        return (comma + glue).join(rng.sample(pairs, len(pairs))) + stop
    if form == "words":  # all four words of each thing, each time in another order
        return (semicolon + glue).join(join(rng.sample(thing, 4)) for thing in rng.sample(scene, len(scene))) + stop
    # every place in reading order, with what is there
    found = {thing.place: glue + join((thing.colour, thing.size, thing.shape)) for thing in scene}
    return (semicolon + glue).join(
        language.words[place] + found.get(place, language.nothing) for place in PLACES
    ) + stop


FORMS = ["caption", "words", "pairs", "places"]


# --- reading --------------------------------------------------------------------------------------------------------

FILLERS = r"的|在|有|图中|一个|\b(an?|the|at|on|in|is|are|and|there)\b"


def read_scene(text):
    """The scene that words or sentences describe, Chinese or English: things between commas, each with a colour and a shape.

    A thing is big where no size is named, and in the first free place, beginning in the middle, where no place is. BadInput
    says what is missing or not understood.
    """
    example = "for example: 红色 星形 左上角, small blue circle middle"
    language = LANGUAGES["zh"]
    chinese = {word: key for key, word in language.words.items()}
    chinese |= {other: chinese[word] for word, others in language.synonyms.items() for other in others}
    chinese |= {language.words[colour][0]: colour for colour in COLOURS}  # as in 红圆
    longest_first = "|".join(sorted(chinese, key=len, reverse=True))
    scene = []
    for part in filter(str.strip, re.split(r"[,，;；、。.和]|\band\b", text.lower().replace("-", " "))):
        # Chinese words become English ones; then take out each field's word
        rest = re.sub(longest_first, lambda match: f" {chinese[match[0]]} ", part)
        words = {}
        for field, known in FIELDS.items():
            found = re.findall(rf"\b({'|'.join(sorted(known, key=len, reverse=True))})\b", rest)
            if len(found) > 1:
                raise BadInput(
                    f"{part.strip()} has two words for its {field}, {' and '.join(found)}: put a comma between things"
                )
            words[field] = found[0] if found else None
            rest = re.sub(rf"\b{found[0]}\b", " ", rest) if found else rest
        rest = re.sub(FILLERS, " ", rest)
        if rest.strip():
            raise BadInput(f"{rest.strip()} is not a word for a place, size, colour or shape here; {example}")
        if not (words["colour"] and words["shape"]):
            raise BadInput(f"{part.strip()} should name a colour and a shape; {example}")
        free = sorted(free_places(scene), key=lambda place: place != "middle")
        place = words["place"] or next(iter(free), None)
        if place not in free:
            raise BadInput(f"{part.strip()} has no place of its own: there are {', '.join(PLACES)}, each for one thing")
        scene.append(Thing(place, words["size"] or "big", words["colour"], words["shape"]))
    if not scene:
        raise BadInput(f"name what to draw, {example}")
    return tuple(scene)
