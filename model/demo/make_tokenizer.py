"""Makes the demo's tokenizer: a byte-level BPE of about 1,000 tokens, with the special ids of the published one.

    python -m model.demo.make_tokenizer

The one that is shipped has 940; some wordings of questions came later, and it spells their words in parts. One made today
fits neither the shipped language model nor the shipped CLIP: make those again, too.

It is trained on a list of the demo's words, not on sentences: trained on whole sentences, BPE would make one token of
"左上角有一个红色的大圆形" and hide its words from the language model.
"""

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset.demo.sentences import LANGUAGES
from model.errors import run_script

FOLDER = Path(__file__).parent
CHINESE = """
    user assistant 图形 图片 颜色 形状 位置 什么 哪里 几个 多少 多大 没有 有没有 一共 一个 两个 三个 四个 图中 画面 第二 两张 不同 动画
    描述 说明 内容 看图 说话 是 有 在 的 吗 还是 大的 小的 变成 了 移到 不见了 多了 变大了 变小了 变化 空 这张 请 里 请问 你好 请告诉我 大不大
    只有 彩色 动物 个人 天气 怎么样 ， 。 ？ ； ： ！
"""
TEMPLATES = [
    LANGUAGES["en"].questions,
    LANGUAGES["en"].short_questions,
    LANGUAGES["en"].answers,
    LANGUAGES["en"].openings,
]
ENGLISH = """
    how many are there at on in the picture color is it got bigger smaller one two three four no nothing an and a There are Yes No shapes circles
    squares triangles stars crosses rings The A An
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<s>user\\n' + message['content'] + '</s>\\n<s>assistant\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>\\n' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def words():
    """Chinese words, and English ones as they stand at the beginning of a text, after a space, and small."""
    english = re.findall(r"[A-Za-z]+", " ".join([*map(str, TEMPLATES), *LANGUAGES["en"].words.values(), ENGLISH]))
    forms = dict.fromkeys(form for word in english for form in (word, word.lower(), f" {word}", f" {word.lower()}"))
    return [*CHINESE.split(), *LANGUAGES["zh"].words.values(), *forms]


def main():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than needed, so that every word becomes a token
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
    )
    tokenizer.train_from_iterator(words(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(FOLDER)
    print(f"{len(fast)} tokens in {FOLDER}")


if __name__ == "__main__":
    run_script(main)
