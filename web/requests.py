"""Reads and checks what clients send in OpenAI's format: options of the answer, conversation, pictures and videos."""

import base64
import io
import json
import threading
from urllib.parse import unquote

from flask import request
from PIL import UnidentifiedImageError
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from model.conversation import as_conversation, split_at_images
from model.errors import BadInput
from model.generate import SETTINGS
from model.images import MAX_PIXELS, open_picture, picture_frames, video_frames

MB = 1_000_000
MAX_PICTURE = 20 * MB  # bytes of one picture or video, without base64
MAX_REQUEST = 28 * MB  # bytes; base64 makes a picture a third larger
MAX_VIDEO_PIXELS = 1_000_000_000  # of all frames of a video or animation together
MAX_CHARACTERS = 10_000  # far more than fit into the model's context, which has a check of its own

DEFAULT_QUESTION = "描述这张图片。"  # of a message that has only pictures

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image_url", "video_url")
RESPONSES_TYPES = {
    "input_text": "text",
    "output_text": "text",
    "input_image": "image_url",
}  # OpenAI's other API's names
VIDEO_TYPES = {"video/mp4": "mp4", "video/quicktime": "mov", "video/webm": "webm"}  # MIME type -> PyAV's format
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")  # Pillow's

# field of a request -> argument of `Chat.stream`: the same name, except for the number of tokens
OPTIONS = {name: name for name in SETTINGS if name != "max_new_tokens"}
OPTIONS |= {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
# OpenAI's other fields: what stands here changes nothing in an answer; null, which is as good as left out, always works
NEUTRAL = {
    "n": [1],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "logprobs": [False],
    "top_logprobs": [0],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "audio": [],
    "moderation": [],
    "prediction": [],
    "web_search_options": [],
}
# of an assistant's message, as OpenAI's clients send back what they got
NEUTRAL_IN_MESSAGE = {"refusal": [""], "annotations": [[]], "tool_calls": [[]], "audio": [], "function_call": []}
# marks for OpenAI's own records and caches
MARKS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
COMPLETION_FIELDS = {"model", "messages", "stream", "stream_options", "stop", "return_token_ids", *OPTIONS}


def require(condition, message):
    if not condition:
        raise BadInput(message)


def read_fields(given, known, what, neutral=None, ignored=()):
    """The fields of a JSON object that are not null, without those in `neutral` and `ignored`; BadInput for unknown ones.

    neutral: name -> the values that ask for nothing; another value is refused rather than ignored without a word.
    """
    neutral = neutral or {}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        expected = neutral.get(name, [value])
        allowed = " or ".join(map(repr, expected)) or "null"
        require(value in expected, f"{name} can only be {allowed} here, not {value!r:.50}")
        is_known = name in known or name in neutral or name in ignored
        require(is_known, f"{what} has no field {name!r:.50}; it can have {', '.join(sorted(known))}")
    return {name: value for name, value in given.items() if name in known}


# --- the request and its options ------------------------------------------------------------------------------------


def read_body(known, neutral=None, ignored=()):
    """The JSON object of the request, its fields checked; known, neutral, ignored: as in `read_fields`."""
    return read_fields(read_json(), known, "the request", neutral, ignored)


def read_json():
    """The JSON object of the request."""
    if not request.is_json:
        raise UnsupportedMediaType("send JSON, with the header Content-Type: application/json")
    data = request.get_data(cache=False)
    request.stream.read(
        1
    )  # of a body sent in chunks, the first read gives what is below the limit; this one raises 413
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the request is not valid JSON ({str(error)[:100]})") from None
    require(isinstance(body, dict), "the request should be a JSON object")
    return body


def read_options(body, defaults):
    """The sampling settings and stop texts of a request, as arguments of `Chat.stream`."""
    # numbers, each checked against its range
    options = dict(defaults)
    for field, name in OPTIONS.items():
        if field in body:
            require(isinstance(body[field], (int, float)), f"{field} should be a number, not {body[field]!r:.50}")
            options[name] = SETTINGS[name].read(field, body[field])

    # OpenAI's clients send one stop text, or a list of them
    stop = body.get("stop", [])
    if isinstance(stop, str):
        stop = [stop]
    valid = isinstance(stop, list) and len(stop) <= 4 and all(isinstance(text, str) and text for text in stop)
    require(valid, "stop should be a text, or a list of up to four texts, none of them empty")
    options["stop"] = stop

    for field in ("stream", "return_token_ids"):
        value = body.get(field, False)
        require(isinstance(value, bool), f"{field} should be true or false, not {value!r:.50}")
    require(isinstance(body.get("stream_options", {}), dict), "stream_options should be an object")
    return options


def read_token_ids(token_ids, vocab_size, max_tokens):
    """The token ids of an answer, checked: `max_tokens` is how many fit into the context behind the question."""
    valid = isinstance(token_ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in token_ids)
    require(
        valid and 0 < len(token_ids) <= max_tokens,
        f"token_ids should be 1 to {max_tokens} token ids, from 0 to {vocab_size - 1}",
    )
    return token_ids


# --- the conversation -----------------------------------------------------------------------------------------------


def read_messages(chat, messages):
    """OpenAI's messages -> (turns, media).

    turns: (role, text) pairs for `Chat.stream`, with an `<image>` for each picture and for each frame of a video.
    media: for each picture and video, in reading order, a list of its frames, uint8 (3, S, S); a picture has one frame.
    """
    # a message takes at least one token, so more messages than tokens can't fit
    config = chat.config
    require(isinstance(messages, list) and messages, "messages should be a list of at least one message")
    require(
        len(messages) <= config.max_seq_len,
        f"there are {len(messages)} messages, more than the {config.max_seq_len} tokens of the model's context",
    )

    # read all text before any picture: this is cheap, and finds most bad requests
    parsed = []
    characters = 0
    for message in messages:
        role, text, urls = read_message(message, config.image_special_token)
        characters += len(text)
        require(characters <= MAX_CHARACTERS, f"the text has over {MAX_CHARACTERS} characters, which is the limit")
        parsed.append((role, text, urls))

    # the model answers the last message, so that has to be a question; pictures alone ask for what is in them
    last_role, last_text, last_urls = parsed[-1]
    require(last_role == "user", "the last message should be the user's question")
    pieces = split_at_images(last_text, config.image_special_token)
    if not "".join(pieces).strip():
        require(last_urls, "the question is empty")
        parsed[-1] = last_role, "<image>\n" * (len(pieces) - 1) + DEFAULT_QUESTION, last_urls

    # count the pictures before decoding them, which takes time and memory
    sent = sum(len(urls) for _, _, urls in parsed)
    limit = f"but the model's context holds {chat.max_pictures} at most"
    require(sent <= chat.max_pictures, f"{sent} pictures were sent, {limit}")

    # decode them message by message: a text must have as many <image> as its own message has pictures and frames
    turns = []
    media = []
    for role, text, urls in parsed:
        own_frames = 0
        for part_type, url in urls:
            frames = read_medium(chat, part_type, url, number=len(media) + 1)
            own_frames += len(frames)
            media.append(frames)
        turns += as_conversation(text, own_frames, config) if role == "user" else [(role, text)]
    sent = len(all_frames(media))
    require(sent <= chat.max_pictures, f"the pictures and videos have {sent} frames together, {limit}")
    return turns, media


def read_message(message, placeholder):
    """One message -> (role, text, [(part type, URL) of each picture and video])."""
    require(isinstance(message, dict), "each message should be an object with role and content")
    known = {"role", "content", "name"}
    message = read_fields(
        message, known, "a message", NEUTRAL_IN_MESSAGE, ignored={"token_ids"}
    )  # our own, content too
    role = message.get("role")
    role = "system" if role == "developer" else role
    require(role in ROLES, f"role should be one of {', '.join(ROLES)}, not {role!r:.50}")
    text, urls = read_content(message.get("content"))

    # an <image> in the text counts as a picture too
    has_pictures = urls or len(split_at_images(text, placeholder)) > 1
    require(role == "user" or not has_pictures, f"only user messages can have pictures, not {role} messages")
    return role, text, urls


def read_content(content):
    """A message's content, which is text or a list of parts -> (text, [(part type, URL) of each picture and video])."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    require(isinstance(content, list), "content should be text or a list of parts")

    # sort the parts: the position of pictures among the texts makes no difference
    texts = []
    urls = []
    for part in content:
        part_type = part.get("type") if isinstance(part, dict) else None
        if isinstance(part_type, str):
            part_type = RESPONSES_TYPES.get(part_type, part_type)
        require(
            part_type in PART_TYPES,
            f"parts of type {part_type!r:.50} are not supported, only {', '.join(PART_TYPES)}",
        )
        value = part.get(part_type)
        if part_type == "text":
            require(isinstance(value, str), "a part of type text should have a string under text")
            texts.append(value)
        else:
            url = value.get("url") if isinstance(value, dict) else value
            require(isinstance(url, str), f"a part of type {part_type} should have a string under {part_type}.url")
            urls.append((part_type, url))

    # JSON can contain half of a surrogate pair, which the tokenizer can't encode
    text = "\n".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the text contains a lone surrogate (half a character), which is not valid UTF-8") from None
    return text, urls


def all_frames(media):
    """The pictures, and the frames of videos, in one list."""
    return [pixels for frames in media for pixels in frames]


# --- pictures and videos --------------------------------------------------------------------------------------------

decoding = threading.Lock()  # one picture is decoded at a time, so that many clients together don't fill the memory


def read_medium(chat, part_type, url, number):
    """A data: URL of a picture, or of a video or animation sent as "video_url" -> its frames, uint8 (3, S, S).

    number: its place among the request's pictures and videos, for error messages.
    """
    # the URL alone shows some problems, without any decoding
    head, _, data = url.strip().partition(",")
    head = head.lower()
    require(head.startswith("data:"), f"picture {number}: only data: URLs are supported, this server downloads nothing")
    if len(data) * 3 // 4 > MAX_PICTURE:
        raise RequestEntityTooLarge(f"picture {number} is over {MAX_PICTURE // MB} MB: send a smaller one")
    require(head.endswith(";base64"), f"picture {number}: its data: URL should be in base64")

    with decoding:
        try:
            file = io.BytesIO(decode_base64(data))
        except ValueError:
            raise BadInput(f"picture {number}: its base64 is invalid") from None

        # every error names the picture it is about
        try:
            mime_type = head.removeprefix("data:").partition(";")[0]
            return decode_frames(chat, part_type, file, mime_type)
        except BadInput as problem:
            raise BadInput(f"picture {number}: {problem}") from None
        except UnidentifiedImageError:
            raise BadInput(
                f"picture {number} can't be read: not a picture or video, or not in a supported format"
            ) from None
        except Exception as error:  # noqa: BLE001  Pillow's decoders raise all sorts of things on broken files
            raise BadInput(f"picture {number} can't be read: {str(error)[:100]}") from None


def decode_base64(text):
    """The bytes of a base64 text as clients write it: with line breaks, without padding, escaped or made for URLs."""
    text = "".join(unquote(text).split()).translate(str.maketrans("-_", "+/", "="))
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def decode_frames(chat, part_type, file, mime_type):
    """An open file -> its frames, uint8 (3, S, S): up to `chat.max_frames` for a "video_url", otherwise the first."""
    preprocess = chat.encoder.preprocess
    as_video = part_type == "video_url"
    max_frames = chat.max_frames if as_video else 1

    # the URL says whether it is a video, and in which format, which PyAV has to be told
    format = VIDEO_TYPES.get(mime_type)
    if format:
        require(as_video, "a video should be sent as video_url, not as image_url")
        return video_frames(file, format, preprocess, max_frames, MAX_VIDEO_PIXELS)

    # anything else has to be a picture or an animation; check its size before Pillow unpacks a single pixel
    with open_picture(file, IMAGE_FORMATS) as image:
        pixels = image.width * image.height
        require(pixels <= MAX_PIXELS, f"it has {pixels / MB:.0f} megapixels, over the limit of {MAX_PIXELS // MB}")
        count = getattr(image, "n_frames", 1) if as_video else 1
        require(count * pixels <= MAX_VIDEO_PIXELS, f"it has {count} frames, too many of this size: shorten it")
        return picture_frames(image, preprocess, max_frames)
