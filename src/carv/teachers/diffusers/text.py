"""Text encoders of pipeline folders: one prompt in, its embeddings out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from carv.teachers.diffusers.folder import PipelineFolder
from carv.teachers.diffusers.options import Options

_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")


class TextEncoder:
    """A tokenizer and the network that reads its tokens.

    Prompts are encoded one by one: what a prompt's embedding is does not depend on its company.

    Attributes:
        model: the network.
        length: how many tokens a prompt is padded to.
        width: of its embeddings.
    """

    def __init__(self, tokenizer: Any, model: Any, length: int) -> None:
        self.model, self.length, self.width = model, length, int(model.config.hidden_size)
        self._tokenizer = tokenizer

    @classmethod
    def clip(cls, folder: PipelineFolder, number: str, options: Options, known: str = "CLIPTextModel") -> TextEncoder:
        """A CLIP text encoder. `number` is "", "_2": the end of its name in the folder."""
        tokenizer = folder.tokenizer(f"tokenizer{number}", _CLIP_TOKENIZERS)
        model = folder.model(f"text_encoder{number}", (known,), options.dtype, options.device)
        # A tokenizer without a limit of its own says 10^30.
        length = min(int(tokenizer.model_max_length), int(model.config.max_position_embeddings))
        return cls(tokenizer, model, length)

    @classmethod
    def t5(
        cls, folder: PipelineFolder, number: str, options: Options, length: int, known: str = "T5EncoderModel"
    ) -> TextEncoder:
        """A T5 encoder; `length` is the pipeline's own number of tokens, fewer where the tokenizer reads fewer."""
        tokenizer = folder.tokenizer(f"tokenizer{number}", _T5_TOKENIZERS)
        model = folder.model(f"text_encoder{number}", (known,), options.dtype, options.device)
        return cls(tokenizer, model, options.max_tokens or min(length, int(tokenizer.model_max_length)))

    def read(self, prompt: str) -> Any:
        """The network's outputs for one prompt, all hidden states included."""
        tokens, _ = self._tokens(prompt)
        with torch.no_grad():
            return self.model(tokens, output_hidden_states=True)

    def states(self, prompt: str) -> Tensor:
        """The last hidden state, `[1, length, width]`."""
        return torch.as_tensor(self.read(prompt)[0])

    def masked_states(self, prompt: str) -> Tensor:
        """The last hidden state with padding neither attended to nor kept: zero beyond the prompt's end."""
        tokens, mask = self._tokens(prompt)
        with torch.no_grad():
            states = torch.as_tensor(self.model(tokens, mask)[0])
        return states * mask[:, :, None].to(states.dtype)

    def _tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        options = {"padding": "max_length", "max_length": self.length, "return_tensors": "pt"}
        tokens = self._tokenizer(prompt, truncation=True, **options)
        untruncated = len(self._tokenizer(prompt, truncation=False).input_ids)
        if untruncated > self.length:
            warnings.warn(
                f"the teacher reads {self.length} tokens of a prompt, and {prompt!r} has {untruncated}: "
                "its end is cut off",
                stacklevel=2,
            )
        device = self.model.device
        return tokens.input_ids.to(device), tokens.attention_mask.to(device)
