"""MiniMind-V as transformers' Auto classes load it, with its CLIP inside; `model.export` copies this file to each folder.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)     AutoProcessor.from_pretrained(...)

Shapes: B batch, T tokens, N images in the batch, S their size in pixels, P tokens per image, V vision width.
"""

import torch
from transformers import BatchFeature, CLIPVisionConfig, CLIPVisionModel, ProcessorMixin

from .conversation import as_conversation, encode_conversations, pad_left, tokenizer_fields
from .images import normalise, to_pixels
from .LMConfig import LMConfig
from .model_vlm import MiniMindVLM


class MiniMindVForConditionalGeneration(MiniMindVLM):
    """`MiniMindVLM` that takes pixels too. `vision_encoder` is None in a folder exported without CLIP, until one is set."""

    def __init__(self, config: LMConfig):
        super().__init__(config)
        clip = getattr(config, "vision_config", None)
        self.vision_encoder = CLIPVisionModel(CLIPVisionConfig(**clip)) if clip else None
        self.post_init()

    def encode_images(self, pixel_values):
        """Normalised pixels (N, 3, S, S) -> features (N, P, V), without a gradient."""
        if self.vision_encoder is None:
            raise ValueError(
                "this folder was exported without --with_vision: set model.vision_encoder = "
                'CLIPVisionModel.from_pretrained("openai/clip-vit-base-patch32"), or pass image_features'
            )
        with torch.no_grad():
            return self.vision_encoder(pixel_values.to(self.vision_encoder.dtype)).last_hidden_state

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
    """Questions and pictures in, the model's inputs out; the code is that of training."""

    def __init__(self, tokenizer, image_size=224, image_tokens=50, **kwargs):
        super().__init__(tokenizer, **kwargs)
        self.image_size, self.image_tokens = image_size, image_tokens

    def __call__(self, images=None, text="", **kwargs):
        """`input_ids`, `attention_mask` (B, T), padded on the left, and `pixel_values` (N, 3, S, S) as tensors.

        text: a question, or a list of questions. images: a Pillow image, or a list of them for all questions in reading
        order. A single question without `<image>` gets its pictures in front; in a list, each question marks with `<image>`
        where its pictures go. BadInput if a single question has another number of `<image>` than images; a list is checked
        by the model.
        """
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]

        # each question as a conversation of one turn, then as token ids
        config = LMConfig(image_tokens=self.image_tokens, **tokenizer_fields(self.tokenizer))
        if isinstance(text, str):
            conversations = [as_conversation(text, len(images), config)]
        else:
            conversations = [[("user", question)] for question in text]
        prompts = [ids.tolist() for ids, _ in encode_conversations(self.tokenizer, conversations, config)]
        input_ids, attention_mask = pad_left(prompts)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if images:
            pixels = torch.stack([to_pixels(image, self.image_size) for image in images])
            inputs["pixel_values"] = normalise(pixels)
        return BatchFeature(inputs)
