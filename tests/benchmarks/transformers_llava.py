"""A model of ours in training as transformers' own LLaVA: from the same weights, on the same batches, with the same losses."""

import copy
import math

import torch
from transformers import LlavaForConditionalGeneration

from model.images import normalise
from model.llava import llava_config, pack_llava
from model.model_vlm import find_placeholders, placeholder_positions
from model.vision_utils import quiet_transformers


class Llava:
    """transformers' LLaVA and its AdamW, with a copy of the weights that a `Run` of the trainer has.

    A LLaVA's projector has two layers; here it is ours, so that both train the same parameters.
    """

    def __init__(self, run):
        self.run = run
        config, encoder = run.model.config, run.encoder

        # `from_pretrained` would take the tensors themselves, and both would then train the same memory
        tensors = pack_llava(run.model.state_dict(), config, encoder.model.state_dict())
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        theirs = llava_config(config, encoder, image_token_id=config.pad_token_id)
        with quiet_transformers():
            self.model = LlavaForConditionalGeneration.from_pretrained(
                None, config=theirs, state_dict=tensors, dtype=torch.float32
            )
        self.model = self.model.to(run.device).train()
        self.model.model.multi_modal_projector = copy.deepcopy(run.model.vision_proj)

        # what the trainer freezes, and CLIP's precision
        self.model.model.vision_tower.to(encoder.dtype).requires_grad_(False)
        self.model.model.language_model.requires_grad_(not run.args.freeze_llm)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=run.optimizer.defaults["fused"])

    def inputs(self, batch):
        """A batch of `collate` as LLaVA takes it: a placeholder is a run of one token, here the id of padding, which becomes </s>."""
        config, encoder = self.run.model.config, self.run.encoder
        names = ("input_ids", "labels", "pixel_values")
        input_ids, labels, pixels = (batch[name].to(self.run.device) for name in names)
        mask = input_ids != config.pad_token_id  # (B, T)
        starts = find_placeholders(input_ids, config.image_ids)
        input_ids = input_ids.masked_fill(~mask, config.eos_token_id)
        input_ids.view(-1)[placeholder_positions(starts, len(pixels), config.image_tokens)] = config.pad_token_id
        pixel_values = normalise(pixels, encoder.mean, encoder.std)
        return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels, "pixel_values": pixel_values}

    def train_step(self, micro_batches, answer_tokens):
        """One optimizer step over `inputs`, in the manner of transformers' Trainer; returns its loss ().

        answer_tokens: how many labels they have. The learning rate is that of the run's last step.
        """
        run, loss = self.run, torch.zeros((), device=self.run.device)
        self.optimizer.param_groups[0]["lr"] = run.optimizer.param_groups[0]["lr"]
        for batch in micro_batches:
            with torch.autocast(run.device.split(":")[0], run.dtype, enabled=run.dtype != torch.float32):
                share = self.model(**batch, num_items_in_batch=answer_tokens).loss
            share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss
