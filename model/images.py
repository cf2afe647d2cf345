"""Any picture, video or animation in, uint8 pixels (3, S, S) out, S the encoder's size; and pixels as CLIP wants them."""

import contextlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from .errors import BadInput, BadRecord

UPRIGHT = {  # EXIF's orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# of CLIP's training pictures, channel by channel, on a scale of 0 to 1
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def to_rgb(image):
    """Any Pillow image as upright RGB: EXIF rotation applied, 16 bits scaled to 8, transparency laid on white."""
    # not ImageOps.exif_transpose, which writes all of EXIF anew and fails at a tag of the wrong type
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, size):
    """A Pillow image as uint8 (3, size, size): the whole picture, squeezed to a square (bicubic, as the published code).

    A JPEG that is not read yet is read at the smallest of its scales (1/2, 1/4, 1/8) that is at least twice as large.
    """
    image.draft(None, (2 * size, 2 * size))
    pixels = np.asarray(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def normalise(pixels, mean=PIXEL_MEAN, std=PIXEL_STD):
    """uint8 pixels (N, 3, S, S) -> what CLIP was trained on, float32; mean and std on the pixels' device."""
    return (pixels.float() / 255 - mean) / std


@contextlib.contextmanager
def opened(path, opener=Image.open):
    """A Pillow image or another file, to be read; BadRecord names the file if that fails."""
    try:
        with opener(path) as file:
            yield file
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  Pillow's decoders raise all sorts of things on broken files
        why = getattr(error, "strerror", None) or error
        reason = "picture missing" if isinstance(error, FileNotFoundError) else "picture unreadable"
        raise BadRecord(reason, f"{path} could not be read as a picture ({why}): replace it or leave it out") from None


def read_pixels(path, size):
    """`to_pixels` of a file; BadRecord names the file if it is missing or no picture."""
    with opened(path) as image:
        return to_pixels(image, size)


# --- short clips ----------------------------------------------------------------------------------------------------

VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska"}  # suffix -> PyAV's name
ANIMATED = ("GIF", "WEBP", "PNG")  # of Pillow's formats; the others' further pictures are pages and thumbnails
MAX_PIXELS = 50_000_000  # of a video's frame


def frame_indices(count, most):
    """Numbers of at most `most` of `count` frames, evenly spread from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def read_frames(path, size, most):
    """A file's frames, at most `most` of them, as a list of uint8 pixels (3, size, size); of a still picture, itself.

    Animated GIF, WebP and PNG are read by Pillow, videos by PyAV if it is there. BadInput names the file and what is wrong.
    """
    kind = VIDEOS.get(Path(path).suffix.lower())
    with opened(path, partial(open, mode="rb") if kind else Image.open) as file:
        return video_frames(file, kind, size, most) if kind else picture_frames(file, size, most)


def picture_frames(image, size, most):
    """`read_frames` of an open Pillow image."""
    frames = []
    for number in frame_indices(image.n_frames if image.format in ANIMATED else 1, most):
        image.seek(number)
        frames.append(to_pixels(image, size))
    return frames


def video_frames(file, kind, size, most, most_pixels=math.inf):
    """`read_frames` of an open file of a kind that VIDEOS names; ValueError if it is broken.

    Read twice from beginning to end: once to count its frames, once to take some. BadInput if there is no PyAV, or if
    all its frames together have over `most_pixels`.
    """
    try:
        import av
    except ImportError:
        raise BadInput("to read videos, PyAV is needed: pip install av (GIF, WebP and APNG work without)") from None
    try:
        with av.open(file, format=kind) as container:
            if not container.streams.video:
                raise ValueError("there is no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            count = sum(1 for packet in container.demux(stream) if packet.size)
            pixels = count * stream.width * stream.height
            if pixels > most_pixels:
                raise BadInput(f"{count} frames of {stream.width}x{stream.height} are too long a video: cut it")
            container.seek(0)
            wanted = set(frame_indices(count, most))
            frames = (frame for number, frame in enumerate(container.decode(stream)) if number in wanted)
            pixels = [to_pixels(frame.to_image().rotate(frame.rotation, expand=True), size) for frame in frames]
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from None
    if not pixels:
        raise ValueError("there is no frame in it")
    return pixels
