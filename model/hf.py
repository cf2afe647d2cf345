"""MiniMind-V as transformers' Auto classes load it, with its encoder inside; `model.export` copies this file to each folder.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)     AutoProcessor.from_pretrained(...)

Shapes: B batch, T tokens, N images in the batch, S their size in pixels, P tokens per image, V vision width.
"""

import os
from itertools import chain, islice

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from .conversation import (
    PUBLISHED_TEMPLATE,
    as_conversation,
    encode,
    encode_conversations,
    pad_left,
    split_at_images,
    split_at_special,
    tokenizer_fields,
)
from .errors import BadInput
from .images import Preprocess, normalise, read_pixels, to_pixels
from .LMConfig import LMConfig
from .model_vlm import MiniMindVLM

VIT_B_32 = Preprocess()


class MiniMindVForConditionalGeneration(MiniMindVLM):
    """`MiniMindVLM` that takes pixels too. `vision_encoder` is None in a folder exported without one, until it is set."""

    def __init__(self, config: LMConfig):
        super().__init__(config)
        vision = getattr(config, "vision_config", None)
        self.vision_encoder = AutoModel.from_config(AutoConfig.for_model(**vision)) if vision else None
        self.post_init()

    def encode_images(self, pixel_values):
        """Normalised pixels (N, 3, S, S) -> features (N, P, V), without a gradient."""
        if self.vision_encoder is None:
            raise ValueError(
                "this folder was exported without --with_vision: set model.vision_encoder = "
                'CLIPVisionModel.from_pretrained("openai/clip-vit-base-patch32"), or pass image_features'
            )
        with torch.no_grad():
            features = self.vision_encoder(pixel_values.to(self.vision_encoder.dtype)).last_hidden_state
        return features[:, 1:] if self.config.drop_class_token else features

    def forward(
        self, input_ids, pixel_values=None, image_features=None, attention_mask=None, logits_to_keep=0, **kwargs
    ):
        """As `MiniMindLM.forward`, with pixel_values (N, 3, S, S) in place of image_features (N, P, V)."""
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        # attention_mask and logits_to_keep are named above because `generate` inspects the signature for them
        return super().forward(
            input_ids, image_features, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **kwargs
        )

    def _expand_inputs_for_generation(self, expand_size=1, pixel_values=None, image_features=None, **kwargs):
        """`generate` calls this once: pictures run through CLIP here, however many answers or beams a question has."""
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        return super()._expand_inputs_for_generation(expand_size, image_features=image_features, **kwargs)


class MiniMindVProcessor(ProcessorMixin):
    """Questions or chats and pictures in, the model's inputs out; the code is that of training.

    A picture is a Pillow image, or a file, URL or base64 text of one.
    """

    def __init__(
        self,
        tokenizer,
        image_tokens=50,
        image_chars=("<", ">"),
        image_size=VIT_B_32.size,
        resample=VIT_B_32.resample,
        image_mean=VIT_B_32.mean,
        image_std=VIT_B_32.std,
        chat_template=None,
        **kwargs,
    ):
        chat_template = chat_template or tokenizer.chat_template or PUBLISHED_TEMPLATE
        super().__init__(tokenizer, chat_template=chat_template, **kwargs)
        self.image_tokens, self.image_chars = image_tokens, image_chars
        self.image_size, self.resample, self.image_mean, self.image_std = image_size, resample, image_mean, image_std

    def __call__(self, images=None, text="", **kwargs):
        """`input_ids`, `attention_mask` (B, T), padded on the left, and `pixel_values` (N, 3, S, S) as tensors.

        text: a question, or a list of questions; or what `apply_chat_template` wrote. images: a picture, a list of them for
        all questions in reading order, or a list of each question's list. A question without `<image>` gets its pictures in
        front. BadInput if a question has another number of `<image>` than pictures.
        """
        texts = [text] if isinstance(text, str) else list(text)
        config = self.model_config()
        prompts = []
        pictures = pictures_of_each(images, texts, config.image_special_token)
        for question, own in zip(texts, pictures, strict=True):
            [(_, marked)] = as_conversation(question, len(own), config)
            prompts.append(self.encode_question(marked, config))
        return self.inputs(prompts, [*chain(*pictures)])

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tokenize=False,
        return_dict=False,
        continue_final_message=False,
        **kwargs,
    ):
        """A chat, or a list of chats, in the form of training: text, or with `tokenize` ids, with `return_dict` all inputs.

        A chat is a list of messages with role and content, which is text or a list of parts: {"type": "text", "text": ...},
        {"type": "image", "image" (or "url", "path", "base64"): ...} or OpenAI's image_url. The pictures of a message come
        before its text. A chat that ends with a question is followed by the beginning of its answer;
        continue_final_message: the last message is the beginning of an answer.
        """
        if chat_template not in (None, self.chat_template):
            raise BadInput("this model was trained with the chat template in its folder, and takes no other")
        config = self.model_config()
        batched = not isinstance(conversation[0], dict)
        chats = [read_chat(chat, config) for chat in (conversation if batched else [conversation])]

        # the text, for `__call__`
        if not tokenize:
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": role, "content": text} for role, text in turns],
                    chat_template=self.chat_template,
                    add_generation_prompt=turns[-1][0] == "user",
                    continue_final_message=continue_final_message,
                    tokenize=False,
                )
                for turns, _ in chats
            ]
            return texts if batched else texts[0]

        # or the ids; an answer that is to be continued is tokenised by itself, as in training, but has no end
        begun = [turns[-1][1] if continue_final_message else "" for turns, _ in chats]
        asked = [turns[:-1] if continue_final_message else turns for turns, _ in chats]
        prompts = [
            ids.tolist() + beginning
            for (ids, _), beginning in zip(
                encode_conversations(self.tokenizer, asked, config), encode(self.tokenizer, begun), strict=True
            )
        ]
        inputs = self.inputs(prompts, [picture for _, pictures in chats for picture in pictures])
        return inputs if return_dict else inputs["input_ids"]

    def model_config(self):
        """The tokenizer's and the encoder's part of the model's configuration."""
        placeholder = {"image_tokens": self.image_tokens, "image_chars": self.image_chars}
        return LMConfig(**placeholder, **tokenizer_fields(self.tokenizer, self.image_chars))

    def encode_question(self, text, config):
        """Token ids of a question, or of a text from `apply_chat_template`: that has the step to an answer in it already."""
        step = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": "\ue000"}],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        ).rpartition("\ue000")[2]
        if step not in text:
            return encode_conversations(self.tokenizer, [[("user", text)]], config)[0][0].tolist()
        ids = []
        for piece in split_at_special(self.tokenizer, text):
            if isinstance(piece, list):
                ids += piece
                continue
            first, *rest = encode(self.tokenizer, split_at_images(piece, config.image_special_token))
            ids += [*first, *chain(*(config.image_ids + more for more in rest))]
        return ids

    def inputs(self, prompts, images):
        """Lists of token ids and their pictures in reading order -> the model's inputs."""
        input_ids, attention_mask = pad_left(prompts)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if images:
            preprocess = Preprocess(self.image_size, self.resample, self.image_mean, self.image_std)
            pixels = torch.stack([read_picture(image, preprocess) for image in images])
            inputs["pixel_values"] = normalise(pixels, *preprocess.statistics())
        return BatchFeature(inputs)


def read_picture(image, preprocess):
    """A picture as uint8 (3, S, S)."""
    if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        return read_pixels(image, preprocess)
    if not isinstance(image, Image.Image):
        image = load_image(image)
    return to_pixels(image, preprocess)


def pictures_of_each(images, texts, placeholder):
    """The pictures of each question as a list of lists; images, texts: as `MiniMindVProcessor` takes them."""
    if images is None:
        images = []
    elif not isinstance(images, (list, tuple)):
        images = [images]

    # a list for each question
    if any(isinstance(own, (list, tuple)) for own in images):
        if len(images) != len(texts):
            raise BadInput(
                f"{len(images)} lists of images were given for {len(texts)} questions: give each one its list"
            )
        return [own if isinstance(own, (list, tuple)) else [own] for own in images]

    # one list for all: each question takes as many as it has `<image>`; one each if nothing says otherwise
    if len(texts) == 1:
        return [images]
    wanted = [len(split_at_images(text, placeholder)) - 1 for text in texts]
    if not any(wanted) and len(images) == len(texts):
        wanted = [1] * len(texts)
    if sum(wanted) != len(images):
        raise BadInput(
            f"{len(images)} images were given, but the {len(texts)} questions have {sum(wanted)} <image>: give each its own list"
        )
    rest = iter(images)
    return [list(islice(rest, count)) for count in wanted]


def read_chat(messages, config):
    """Messages of a chat -> (its (role, text) turns with an `<image>` for each picture, its pictures in reading order)."""
    turns, pictures = [], []
    for message in messages:
        role, content = message["role"], message["content"]
        texts, own = [], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] in ("image", "image_url"):
                source = next(
                    (part[key] for key in ("image", "url", "path", "base64", "image_url") if key in part), None
                )
                own.append(source["url"] if isinstance(source, dict) else source)
            else:
                raise BadInput(f"parts of type {part['type']!r:.50} are not supported, only text, image and image_url")

        # a part {"type": "image"} without a picture says where one goes that is given later, with the text
        text = "\n".join(texts)
        if own and role != "user":
            raise BadInput(f"only user messages can have pictures, not {role} messages")
        turns += as_conversation(text, len(own), config) if role == "user" else [(role, text)]
        pictures += [picture for picture in own if picture is not None]
    return turns, pictures
