"""Any picture, video or animation in, uint8 pixels (3, S, S) out, S the encoder's size; and how it normalises them."""

import contextlib
import math
import re
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
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # in a file's first bytes, by ISO/IEC 23008-12


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
    """Any Pillow image as upright RGB: EXIF rotation applied, 16 bits scaled to 8, transparency laid on white.

    ValueError if nothing says which of its grey values is white.
    """
    # load first: TIFF turns the picture while it loads, and only then does EXIF say what is left to do; without its name
    # it is not mapped into memory, where Pillow mixes up width and height of one to be turned
    if image.format == "TIFF":
        image.filename = ""
    image.load()
    # not ImageOps.exif_transpose: it rewrites all of EXIF and fails on malformed tags
    transposition = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if image.mode.startswith(("I", "F")):
        image = deep_grey(image)
    if transposition is not None:
        image = image.transpose(transposition)

    # a plain conversion drops the transparency and shows whatever colour lies under it
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def deep_grey(image):
    """Grey of 16 bits scaled to 8, as Pillow's own conversion saturates at 255. ValueError for a file of deeper grey."""
    # what Pillow itself converted goes up to 255, mode I is 16 bits of a PGM, and in other formats has any range
    if image.mode in ("I", "F") and not image.format:
        return image.convert("L")
    if image.mode == "F" or image.mode == "I" and image.format != "PPM":
        numbers = "floats" if image.mode == "F" else "32-bit or signed numbers"
        raise ValueError(f"its grey values are {numbers}, and nothing says which is white: save it with 8 or 16 bits")
    bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0] if image.format == "TIFF" else 16  # TIFF may have 12
    return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))


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


def open_picture(file, formats=None):
    """`Image.open`, and HEIC too if pillow-heif is installed. ValueError names what Pillow can't read."""
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as opened_file:
            opened_file.seek(0)
            begin = opened_file.read(40)
        brands = begin[8:] if begin[4:8] == b"ftyp" else b""
        if b"avif" in brands:
            raise ValueError("AVIF, which this Pillow can't read: pip install -U pillow, or save it as JPEG") from None
        if not any(brand in brands for brand in HEIC):
            raise
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("an iPhone's HEIC: pip install pillow-heif, or save it as JPEG") from None
    pillow_heif.register_heif_opener()
    return Image.open(file, formats=["HEIF"])


@contextlib.contextmanager
def opened(path, opener=open_picture):
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
        elif re.match(r"\w{2,}:/", str(path)):
            why = "it is a URL, and nothing is downloaded"
        path = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."  # as of a picture given as text
        reason = "picture missing" if isinstance(error, FileNotFoundError) else "picture unreadable"
        raise BadRecord(reason, f"{path} could not be read as a picture ({why}): replace it or leave it out") from None


def read_pixels(path, preprocess, opener=open_picture):
    """`to_pixels` of a file; BadRecord names it if it is missing or not a picture.

    opener: called with the path, returns a Pillow image; for pictures that are inside another file.
    """
    with opened(path, opener) as image:
        return to_pixels(image, preprocess)


# --- videos and animations ------------------------------------------------------------------------------------------

VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska"}  # suffix -> PyAV's name
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # Pillow's; in other formats, further frames are pages or thumbnails
MAX_PIXELS = 50_000_000  # of one frame of a video, or of a picture sent to the server
LONGEST_STEP = 1.0  # seconds between two frames that are taken, if --max_frames is large enough
SHORTEST = 10  # milliseconds; browsers show a frame that says less, or nothing, for 100


def frame_indices(starts, end, max_frames):
    """Indices of at most `max_frames` frames, evenly spread in time from the first to the last.

    starts: when each frame begins, from 0 on; end: when the last one ends; in seconds. A frame that lasts is taken
    several times, as GIF and WebP write equal frames once, with their durations added up.
    """
    # the fewest equal steps that begin with every frame; more of them, if they would be longer than LONGEST_STEP
    fitting = None
    for count in range(len(starts), max_frames + 1):
        positions = np.array(starts) * count / end  # in steps
        steps = positions.round()
        if np.abs(positions - steps).max() < 0.1 and (np.diff(steps) > 0).all():
            fitting = np.searchsorted(steps, np.arange(count), side="right") - 1
            if end / count <= LONGEST_STEP:
                break

    # too many frames for that, or no such steps
    if fitting is None:
        times = np.linspace(0, end, max_frames) + 1e-6  # so that no frame is missed by a rounding error
        fitting = np.searchsorted(starts, times, side="right") - 1
    return fitting.tolist()


def read_frames(path, preprocess, max_frames):
    """Up to `max_frames` frames of a file as a list of uint8 pixels (3, S, S); one for a still picture.

    Pillow reads animated GIF, WebP, PNG and AVIF; PyAV, if installed, reads videos. BadInput names the file and the fault.
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
    if count == 1 or max_frames == 1:
        return [to_pixels(image, preprocess)]

    # when each frame begins; an APNG's first picture may be for programs that can't animate it
    shown = range(1 if image.info.get("default_image") else 0, count)
    ends = [0]
    for index in shown:
        image.seek(index)
        image.load()
        duration = image.info.get("duration") or 0
        ends.append(ends[-1] + (duration if duration > SHORTEST else 100) / 1000)

    frames = {}
    indices = frame_indices(ends[:-1], ends[-1], max_frames)
    for index in dict.fromkeys(indices):
        image.seek(shown[index])
        frames[index] = to_pixels(image, preprocess)
    return [frames[index] for index in indices]


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

            # when frames are shown, without decoding any: what the container says of their number is often wrong
            durations = {}  # when a frame begins -> how long it lasts, in the stream's unit of time
            count = 0
            for packet in container.demux(stream):
                count += packet.size > 0
                if packet.size and not packet.is_discard:
                    durations[packet.dts if packet.pts is None else packet.pts] = packet.duration or 0
            if count * stream.width * stream.height > max_pixels:
                raise BadInput(
                    f"the video has {count} frames of {stream.width}x{stream.height}, too many of this size: shorten it"
                )
            if not durations:
                raise ValueError("there is no frame in it")

            # a frame lasts until the next begins; of the last one some containers know nothing, or too little
            starts = np.array(sorted(durations))
            last = max(durations[starts[-1]], np.median(np.diff(starts)) if len(starts) > 1 else 1)
            unit = float(stream.time_base)
            indices = frame_indices((starts - starts[0]) * unit, (starts[-1] + last - starts[0]) * unit, max_frames)
            times = starts[indices]

            # decode from the beginning, as seeking would only find key frames; at each time, take the frame seen then
            container.seek(0)
            frames = []
            seen = None
            for frame in container.decode(stream):
                while seen and len(frames) < len(times) and frame.pts > times[len(frames)]:
                    frames.append(upright_pixels(seen, preprocess))
                seen = frame
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from None
    if not seen:
        raise ValueError("there is no frame in it")
    return frames + [upright_pixels(seen, preprocess)] * (len(times) - len(frames))


def upright_pixels(frame, preprocess):
    """`to_pixels` of a video's frame, rotated as the video says."""
    return to_pixels(frame.to_image().rotate(frame.rotation, expand=True), preprocess)
