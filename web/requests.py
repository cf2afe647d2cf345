"""Reads and checks what clients send in OpenAI's format: options of the answer, conversation, pictures and videos."""

import base64
import io
import json
import threading

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

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image_url", "video_url")
VIDEO_TYPES = {"video/mp4": "mp4", "video/quicktime": "mov", "video/webm": "webm"}  # MIME type -> PyAV's format
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")  # Pillow's

# field of a request -> argument of `Chat.stream`: the same name, except for the number of tokens
OPTIONS = {name: name for name in SETTINGS if name != "max_new_tokens"}
OPTIONS |= {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
FIXED_OPTIONS = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False}  # no other value works here
OTHER_FIELDS = {"model", "messages", "stream", "stream_options", "stop", "user", "return_token_ids"}
COMPLETION_FIELDS = OTHER_FIELDS | OPTIONS.keys() | FIXED_OPTIONS.keys()


def require(condition, message):
    if not condition:
        raise BadInput(message)


def require_known_fields(given, known, what):
    for name in given:
        require(name in known, f"{what} has no field {name!r:.50}; it can have {', '.join(sorted(known))}")


# --- the request and its options ------------------------------------------------------------------------------------


def read_body(known_fields):
    """The JSON object of the request, without the fields that are null; BadInput if it has any unknown field."""
    if not request.is_json:
        raise UnsupportedMediaType("send JSON, with the header Content-Type: application/json")
    try:
        body = json.loads(request.get_data(cache=False))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the request is not valid JSON ({str(error)[:100]})") from None
    require(isinstance(body, dict), "the request should be a JSON object")
    require_known_fields(body, known_fields, "the request")
    return {name: value for name, value in body.items() if value is not None}


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

    # refuse what would otherwise be ignored without a word
    for field, value in FIXED_OPTIONS.items():
        require(body.get(field, value) == value, f"{field} can only be {value!r} here, not {body.get(field)!r:.50}")
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

    # the model answers the last message, so that has to be a question
    last_role, last_text, _ = parsed[-1]
    require(last_role == "user", "the last message should be the user's question")
    require(last_text.replace("<image>", "").strip(), "the question is empty")

    # count the pictures before decoding them, which takes time and memory
    sent = sum(len(urls) for _, _, urls in parsed)
    max_pictures = config.max_seq_len // config.image_tokens
    require(sent <= max_pictures, f"{sent} pictures were sent, but the model's context holds {max_pictures} at most")

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
    return turns, media


def read_message(message, placeholder):
    """One message -> (role, text, [(part type, URL) of each picture and video])."""
    require(isinstance(message, dict), "each message should be an object with role and content")
    require_known_fields(message, {"role", "content", "name"}, "a message")
    role = message.get("role")
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
        require(
            part_type in PART_TYPES,
            f"parts of type {part_type!r:.50} are not supported, only {', '.join(PART_TYPES)}",
        )
        value = part.get(part_type)
        if part_type == "text":
            require(isinstance(value, str), "a part of type text should have a string under text")
            texts.append(value)
        else:
            url = value.get("url") if isinstance(value, dict) else None
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
    head, _, data = url.partition(",")
    require(head.startswith("data:"), f"picture {number}: only data: URLs are supported, this server downloads nothing")
    if len(data) * 3 // 4 > MAX_PICTURE:
        raise RequestEntityTooLarge(f"picture {number} is over {MAX_PICTURE // MB} MB: send a smaller one")
    require(head.endswith(";base64"), f"picture {number}: its data: URL should be in base64")

    with decoding:
        try:
            file = io.BytesIO(base64.b64decode(data, validate=True))
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


def decode_frames(chat, part_type, file, mime_type):
    """An open file -> its frames, uint8 (3, S, S): up to `chat.max_frames` for a "video_url", otherwise the first."""
    size = chat.encoder.image_size
    as_video = part_type == "video_url"
    max_frames = chat.max_frames if as_video else 1

    # the URL says whether it is a video, and in which format, which PyAV has to be told
    format = VIDEO_TYPES.get(mime_type)
    if format:
        require(as_video, "a video should be sent as video_url, not as image_url")
        return video_frames(file, format, size, max_frames, MAX_VIDEO_PIXELS)

    # anything else has to be a picture or an animation; check its size before Pillow unpacks a single pixel
    with open_picture(file, IMAGE_FORMATS) as image:
        pixels = image.width * image.height
        require(pixels <= MAX_PIXELS, f"it has {pixels / MB:.0f} megapixels, over the limit of {MAX_PIXELS // MB}")
        count = getattr(image, "n_frames", 1) if as_video else 1
        require(count * pixels <= MAX_VIDEO_PIXELS, f"it has {count} frames, too many of this size: shorten it")
        return picture_frames(image, size, max_frames)
