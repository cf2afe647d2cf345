"""Any picture, video or animation in, uint8 pixels (3, S, S) out, S the encoder's size; and how it normalises them."""

import contextlib
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import BadInput, BadRecord

UPRIGHT = {  # EXIF's orientation -> the transposition that sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Preprocess(NamedTuple):
    """How an encoder takes its pictures; the defaults are CLIP ViT-B/32's.

    size: S, the pixels of a side. resample: Pillow's number of the filter that resizes to it.
    mean, std: of the encoder's training pictures per channel, on a scale from 0 to 1.
    """

    size: int = 224
    resample: int = Image.Resampling.BICUBIC
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)

    def statistics(self, device="cpu"):
        """`mean` and `std` as tensors (3, 1, 1)."""
        return [torch.tensor(values, device=device).view(3, 1, 1) for values in (self.mean, self.std)]


def to_rgb(image):
    """Any Pillow image as upright RGB: EXIF rotation applied, 16 bits scaled to 8, transparency laid on white."""
    # not ImageOps.exif_transpose: it rewrites all of EXIF and fails on malformed tags
    transposition = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if transposition is not None:
        image = image.transpose(transposition)

    # Pillow's own conversion saturates at 255 instead of scaling 16 bits to 8
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))

    # a plain conversion drops the transparency and shows whatever colour lies under it
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, preprocess):
    """A Pillow image as uint8 (3, S, S): the whole picture, squeezed to a square, as in the published code.

    A JPEG not decoded yet is decoded at a half, quarter or eighth of its size, whichever is the smallest that still has
    `2 * S` pixels a side: much faster, and it looks the same.
    """
    size = preprocess.size
    image.draft(None, (2 * size, 2 * size))
    pixels = np.asarray(to_rgb(image).resize((size, size), preprocess.resample))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def normalise(pixels, mean, std):
    """uint8 pixels (N, 3, S, S) -> float32, by an encoder's mean and standard deviation, tensors (3, 1, 1)."""
    return (pixels.float() / 255 - mean) / std


@contextlib.contextmanager
def opened(path, opener=Image.open):
    """Opens a picture or another file; BadRecord names the file if that fails, or reading it inside the `with` block."""
    try:
        with opener(path) as file:
            yield file
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  Pillow's decoders raise all kinds of exceptions on broken files
        why = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            why = "not a known picture format"
        path = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."  # as of a picture given as text
        reason = "picture missing" if isinstance(error, FileNotFoundError) else "picture unreadable"
        raise BadRecord(reason, f"{path} could not be read as a picture ({why}): replace it or leave it out") from None


def read_pixels(path, preprocess, opener=Image.open):
    """`to_pixels` of a file; BadRecord names it if it is missing or not a picture.

    opener: called with the path, returns a Pillow image; for pictures that are inside another file.
    """
    with opened(path, opener) as image:
        return to_pixels(image, preprocess)


# --- videos and animations ------------------------------------------------------------------------------------------

VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska"}  # suffix -> PyAV's name
ANIMATED = ("GIF", "WEBP", "PNG")  # Pillow's animated formats; in others, further frames are pages or thumbnails
MAX_PIXELS = 50_000_000  # of one frame of a video, or of a picture sent to the server


def frame_indices(count, max_frames):
    """Indices of at most `max_frames` of `count` frames, evenly spread from the first to the last."""
    return np.linspace(0, count - 1, min(count, max_frames)).round().astype(int).tolist()


def read_frames(path, preprocess, max_frames):
    """Up to `max_frames` frames of a file as a list of uint8 pixels (3, S, S); one for a still picture.

    Pillow reads animated GIF, WebP and PNG; PyAV, if installed, reads videos. BadInput names the file and what is wrong.
    """
    format = VIDEOS.get(Path(path).suffix.lower())
    if format:
        with opened(path, partial(open, mode="rb")) as file:
            return video_frames(file, format, preprocess, max_frames)
    with opened(path) as image:
        return picture_frames(image, preprocess, max_frames)


def picture_frames(image, preprocess, max_frames):
    """`read_frames` of an open Pillow image, still or animated."""
    count = image.n_frames if image.format in ANIMATED else 1
    frames = []
    for index in frame_indices(count, max_frames):
        image.seek(index)
        frames.append(to_pixels(image, preprocess))
    return frames


def video_frames(file, format, preprocess, max_frames, max_pixels=math.inf):
    """`read_frames` of an open video; format: one of the values of VIDEOS. ValueError if the file is broken.

    BadInput if PyAV is not installed, or if all frames together have over `max_pixels` pixels.
    """
    try:
        import av
    except ImportError:
        raise BadInput("to read videos, PyAV is needed: pip install av (GIF, WebP and APNG work without)") from None
    try:
        with av.open(file, format=format) as container:
            if not container.streams.video:
                raise ValueError("there is no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # FFmpeg refuses larger frames

            # count the frames without decoding them: what the container says of their number is often missing or wrong
            count = sum(1 for packet in container.demux(stream) if packet.size)
            if count * stream.width * stream.height > max_pixels:
                raise BadInput(
                    f"the video has {count} frames of {stream.width}x{stream.height}, too many of this size: shorten it"
                )

            # decode from the beginning and keep the chosen ones; seeking would only find key frames
            container.seek(0)
            chosen = set(frame_indices(count, max_frames))
            frames = []
            for index, frame in enumerate(container.decode(stream)):
                if index in chosen:
                    image = frame.to_image().rotate(frame.rotation, expand=True)
                    frames.append(to_pixels(image, preprocess))
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from None
    if not frames:
        raise ValueError("there is no frame in it")
    return frames
