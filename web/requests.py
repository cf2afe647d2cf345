"""What clients send, in OpenAI's form, read and checked: turns, pictures and clips, and how the answer should be drawn."""

import base64
import io
import json
import threading

from flask import request
from PIL import Image, UnidentifiedImageError
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from model.conversation import as_conversation, split_at_images
from model.errors import BadInput
from model.generate import SETTINGS
from model.images import MAX_PIXELS, picture_frames, video_frames

MB = 1_000_000
MAX_PICTURE, MAX_REQUEST = 20 * MB, 28 * MB  # in bytes; in base64, a third is added
MAX_CLIP_PIXELS = 1000 * MB  # of all its frames
MAX_CHARACTERS = 10_000  # far more than fit into the model's context, which is checked by itself
VIDEO_TYPES = {"video/mp4": "mp4", "video/quicktime": "mov", "video/webm": "webm"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

OPTIONS = {name: name for name in SETTINGS} | {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
del OPTIONS["max_new_tokens"]
OTHER_FIELDS = {"model", "messages", "stream", "stream_options", "stop", "user", "return_token_ids"}
NEUTRAL = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False}  # only these values change nothing
ROLES = ("system", "user", "assistant")


def check(true, message):
    if not true:
        raise BadInput(message)


def check_fields(given, allowed, what):
    for name in given:
        check(name in allowed, f"{what} has no field {name!r:.50}; it can have {', '.join(sorted(allowed))}")


def read_body(allowed):
    """The JSON object of the request, with nothing in it but `allowed` fields; those that are null are left out."""
    if not request.is_json:
        raise UnsupportedMediaType("send JSON, with the header Content-Type: application/json")
    try:
        body = json.loads(request.get_data(cache=False))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the request is not valid JSON ({str(error)[:100]})") from None
    check(isinstance(body, dict), "the request should be a JSON object")
    check_fields(body, allowed, "the request")
    return {name: value for name, value in body.items() if value is not None}


def read_messages(chat, messages):
    """OpenAI's messages -> (turns, media): the conversation for `Chat.stream`, and its pictures and clips in reading order.

    Each of the media is a list of pixels (3, S, S): one of a picture, several of a clip.
    """
    check(isinstance(messages, list) and messages, "messages should be a list of at least one message")
    most = chat.config.max_seq_len  # each has a token at least
    check(len(messages) <= most, f"there are {len(messages)} messages, more than the {most} tokens that are read")
    said, characters = [], 0
    for message in messages:
        check(isinstance(message, dict), "each message should be an object with role and content")
        check_fields(message, {"role", "content", "name"}, "a message")
        role = message.get("role")
        check(role in ROLES, f"role should be one of {', '.join(ROLES)}, not {role!r:.50}")
        text, urls = read_content(message.get("content"))
        named = len(split_at_images(text, chat.config.image_special_token)) > 1
        check(role == "user" or not (urls or named), f"only user messages can have pictures, not those of role {role}")
        characters += len(text)
        check(characters <= MAX_CHARACTERS, f"the text has over {MAX_CHARACTERS} characters, the most that is read")
        said.append((role, text, urls))
    check(role == "user", "the last message should be the user's question")
    check(text.replace("<image>", "").strip(), "the question is empty")
    sent, most = sum(len(urls) for _, _, urls in said), chat.config.max_seq_len // chat.config.image_tokens
    check(sent <= most, f"{sent} pictures were sent, and the model's context holds {most} at most")
    turns, media = [], []
    for role, text, urls in said:
        own = [read_medium(chat, kind, url, len(media) + i) for i, (kind, url) in enumerate(urls, 1)]
        turns += as_conversation(text, len(flat(own)), chat.config) if role == "user" else [(role, text)]
        media += own
    return turns, media


def flat(media):
    """All pictures and frames in one list."""
    return [pixels for frames in media for pixels in frames]


def read_content(content):
    """A message's content, text or a list of parts -> (its text, the kinds and URLs of its pictures and clips)."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    check(isinstance(content, list), "content should be text or a list of parts")
    texts, urls = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        known = ("text", "image_url", "video_url")
        check(kind in known, f"a part of type {kind!r:.50} can't be read: only {', '.join(known)}")
        value = part.get(kind)
        if kind != "text":
            value = value.get("url") if isinstance(value, dict) else None
        check(isinstance(value, str), f"a part of type {kind} should have text under {kind}{'.url' * (kind != 'text')}")
        if kind == "text":
            texts.append(value)
        else:
            urls.append((kind, value))
    text = "\n".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the text holds half a character (a lone surrogate), which is not valid UTF-8") from None
    return text, urls


decoding = threading.Lock()  # one picture at a time is unpacked, so that many visitors don't fill the memory


def read_medium(chat, kind, url, number):
    """A picture, or with kind "video_url" a clip, in a data: URL -> a list of pixels (3, S, S)."""
    head, _, data = url.partition(",")
    check(head.startswith("data:"), f"picture {number}: only data: URLs are read, this server fetches nothing")
    if len(data) * 3 // 4 > MAX_PICTURE:
        raise RequestEntityTooLarge(f"picture {number} is over {MAX_PICTURE // MB} MB: send a smaller one")
    check(head.endswith(";base64"), f"picture {number}: its data: URL should be in base64")
    with decoding:
        try:
            file = io.BytesIO(base64.b64decode(data, validate=True))
        except ValueError:
            raise BadInput(f"picture {number}: its base64 is broken") from None
        try:
            size, clip = chat.encoder.image_size, kind == "video_url"
            most = chat.max_frames if clip else 1
            format = VIDEO_TYPES.get(head.removeprefix("data:").partition(";")[0])
            if format:
                check(clip, "a video should be sent as video_url, not as image_url")
                return video_frames(file, format, size, most, MAX_CLIP_PIXELS)
            with Image.open(file, formats=FORMATS) as image:
                pixels = image.width * image.height
                check(pixels <= MAX_PIXELS, f"it has {pixels / MB:.0f} megapixels, over {MAX_PIXELS // MB}")
                count = getattr(image, "n_frames", 1) if clip else 1
                check(count * pixels <= MAX_CLIP_PIXELS, f"it has {count} frames, too many of this size: cut it")
                return picture_frames(image, size, most)
        except BadInput as problem:
            raise BadInput(f"picture {number}: {problem}") from None
        except UnidentifiedImageError:
            raise BadInput(
                f"picture {number} can't be read: no picture or clip, or of a kind that is not read"
            ) from None
        except Exception as error:  # noqa: BLE001  Pillow's decoders raise all sorts of things on broken files
            raise BadInput(f"picture {number} can't be read: {str(error)[:100]}") from None


def read_options(body, defaults):
    """How the answer should be drawn: the arguments of `Chat.stream`."""
    options = dict(defaults)
    for field, name in OPTIONS.items():
        if field in body:
            check(isinstance(body[field], (int, float)), f"{field} should be a number, not {body[field]!r:.50}")
            options[name] = SETTINGS[name].read(field, body[field])
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    good = isinstance(stop, list) and len(stop) <= 4 and all(isinstance(text, str) and text for text in stop)
    check(good, "stop should be a text, or up to four of them")
    for field, value in NEUTRAL.items():
        check(body.get(field, value) == value, f"{field} can only be {value!r} here, not {body.get(field)!r:.50}")
    for field in ("stream", "return_token_ids"):
        check(isinstance(body.get(field, False), bool), f"{field} should be true or false, not {body.get(field)!r:.50}")
    check(isinstance(body.get("stream_options", {}), dict), "stream_options should be an object")
    return {**options, "stop": stop}
