"""EleutherAI's lm-evaluation-harness on models of omnimoe: ``--model omnimoe --model_args pretrained=FOLDER``.

Releases of the harness that read the entry points ``lm_eval.models`` find the adapter by themselves; for those that do
not, 0.4.13 and older, ``from omnimoe.lm_eval import OmniMoeLM`` registers it, and ``python -m omnimoe.lm_eval`` is the
harness's own command with the adapter registered. Three things differ from its adapter for transformers: a document
begins with the model's begin token, once; rows of the vocabulary that are no text of the tokenizer, those of pictures,
speech and padding, get no probability; routers that look at the whole batch route by the row alone. The class is made
on first use, since the harness takes seconds to import.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizer

from omnimoe.generation.prompts import load_tokenizers
from omnimoe.hub import from_pretrained, load
from omnimoe.layers.masks import is_causal_rule
from omnimoe.model import MODELS, OmniMoeConfig, OmniMoeForCausalLM
from omnimoe.tokenizers import Tokenizer, load_tokenizer
from omnimoe.tokenizers.text import SPECIAL_TOKENS

_OWN = ("text_tokenizer.json", "hf_text_tokenizer.json")
_FOREIGN = ("tokenizer.json", "tokenizer_config.json")


class TextTokenizer(PreTrainedTokenizer):
    """A text tokenizer of omnimoe with the interface of transformers. Markers written in a text stay text.

    Args:
        tokenizer: one whose first ids are the markers of documents.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, tokenizer: Tokenizer, **kwargs: Any) -> None:
        self.own = tokenizer
        names = [*SPECIAL_TOKENS, *(f"#{i}" for i in range(len(SPECIAL_TOKENS), tokenizer.vocab_size))]
        self._ids = {name: i for i, name in enumerate(names)}
        self._names = names
        markers = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=False))
        super().__init__(**{**markers, "split_special_tokens": True, **kwargs})

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.own.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Names of tokens to ids."""
        return dict(self._ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._names[i] for i in self.own.encode(text).tolist()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Names of tokens to the text they stand for; markers stand for their names."""
        runs = itertools.groupby(tokens, key=lambda token: token in SPECIAL_TOKENS)
        return "".join(
            "".join(run) if is_marker else self.own.decode([self._ids[token] for token in run])
            for is_marker, run in runs
        )

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list:
        """Puts the begin token first."""
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]


def text_tokenizer(config: OmniMoeConfig, source: Any = None) -> Any:
    """The tokenizer of a model's texts, as transformers' tools take it.

    Args:
        config: of the model.
        source: a tokenizer of transformers or of omnimoe, a folder of either, or None for the one that ships.

    Raises:
        ValueError: if it has more ids than the model has rows for text, or nothing fits.
    """
    found = source
    if isinstance(source, str | Path):
        folder = Path(source)
        own = [name for name in _OWN if (folder / name).is_file()]
        if own:
            found = load_tokenizer(own[0].removesuffix("_tokenizer.json"), folder)
        elif any((folder / name).is_file() for name in _FOREIGN):
            from transformers import AutoTokenizer

            found = AutoTokenizer.from_pretrained(folder)
        else:
            raise ValueError(f"{folder} holds no tokenizer: none of {', '.join([*_OWN, *_FOREIGN])}")
    elif source is None:
        found = load_tokenizers(config, None, [text_of(config)])[text_of(config)]
    size = found.vocab_size if isinstance(found, Tokenizer) else len(found)
    held = config.token_ranges[text_of(config)]
    if held.start or size > held.size:
        raise ValueError(
            f"the tokenizer has {size} ids from 0, the model's rows {held.start} to {held.stop} are text; pass "
            "tokenizer=FOLDER with the one that the model was trained with"
        )
    return TextTokenizer(found) if isinstance(found, Tokenizer) else found


def text_of(config: OmniMoeConfig) -> str:
    """The modality that texts are: the one called so, else the first that is discrete."""
    ranges = config.token_ranges
    return "text" if "text" in ranges else next(iter(ranges))


def text_rows(config: OmniMoeConfig, size: int) -> Tensor:
    """``(V,)`` bool, the rows of the vocabulary that a text may hold.

    Args:
        config: of the model.
        size: ids of the tokenizer.
    """
    held = config.token_ranges[text_of(config)]
    allowed = torch.zeros(config.vocab_size, dtype=torch.bool)
    allowed[held.start : min(held.start + size, held.stop)] = True
    for modality in config.modalities:
        if modality.name != held.name:
            markers = (modality.begin_id, modality.end_id, modality.placeholder_id)
            allowed[[token for token in markers if token is not None]] = False
    return allowed


@functools.cache
def _adapter() -> type:
    """The class of the adapter."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("the adapter needs lm-evaluation-harness: pip install 'omnimoe[lm-eval]'") from error

    class OmniMoeLM(HFLM):
        """A model of omnimoe in lm-evaluation-harness.

        Args:
            pretrained: a folder, an id of the Hub, a registered name with weights, or a model.
            tokenizer: see :func:`text_tokenizer`; the folder's own where it has one, else the one that ships.
            device: a GPU if there is one where None.
            dtype: of the weights; float32 on a CPU, and else that of the file, where None.
            revision: on the Hub.
            key: the key of text, for models whose copies are picked by ``key_ids``.
            all_rows: let every row of the vocabulary have a probability.
            peft: folder of an adapter, or its id on the Hub.
            options: of the harness's adapter for transformers: ``batch_size``, ``max_length``, ``add_bos_token``.
        """

        add_bos_token: bool | None

        def __init__(
            self,
            pretrained: Any,
            *,
            tokenizer: Any = None,
            device: str | None = None,
            dtype: str | None = None,
            revision: str | None = None,
            key: str | None = None,
            all_rows: bool = False,
            peft: str | None = None,
            **options: Any,
        ) -> None:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = dtype or ("float32" if device == "cpu" else "auto")
            model = _load(pretrained, device=device, dtype=dtype, revision=revision)
            config = model.config
            _check_likelihood(config)
            if tokenizer is None and isinstance(pretrained, str) and _has_tokenizer(Path(pretrained)):
                tokenizer = pretrained
            tokens = text_tokenizer(config, tokenizer)
            self._key = _key(config, key)
            self._reads_rows_alone = config.is_causal
            size = config.vocab_size if all_rows else len(tokens)
            self._allowed = text_rows(config, size) if not all_rows else torch.ones(size, dtype=torch.bool)
            self._allowed = self._allowed.to(model.device)
            if peft:
                model.load_adapter(peft)
            super().__init__(pretrained=model, tokenizer=tokens, backend="causal", **options)

        def _inputs(self, ids: Tensor) -> dict[str, Any]:
            return {} if self._key is None else {"key_ids": torch.full_like(ids, self._key)}

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            # with a cache, routers that would compare the rows of a batch, its padding too, look at each alone
            cached = {} if self._reads_rows_alone else {"use_cache": True}
            with torch.no_grad(), self._autocast():
                logits = self.model(input_ids=inps, **self._inputs(inps), **cached).logits
            return logits.float().masked_fill(~self._allowed, float("-inf"))

        def _autocast(self) -> torch.autocast:
            precision = self.mixed_precision_dtype
            return torch.autocast(self.device.type, dtype=precision, enabled=precision is not None)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            """Log-probabilities of whole texts; the harness itself puts the begin token before them here."""
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            finally:
                self.add_bos_token = before

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            def text_alone(input_ids: Tensor, scores: Tensor) -> Tensor:
                return scores.masked_fill(~self._allowed, float("-inf"))

            options["logits_processor"] = LogitsProcessorList([text_alone])
            return super()._model_generate(context, max_length, stop, free=True, **self._inputs(context), **options)

    OmniMoeLM.__module__, OmniMoeLM.__qualname__ = __name__, "OmniMoeLM"
    _register()
    return OmniMoeLM


def _register() -> None:
    """Makes the adapter known to the harness as ``omnimoe``."""
    import lm_eval.models  # noqa: F401 - fills the registry, which would not look once it holds something
    from lm_eval.api.registry import model_registry

    if "omnimoe" not in model_registry:
        model_registry.register("omnimoe", target="omnimoe.lm_eval:OmniMoeLM")


def _load(source: Any, *, device: str, dtype: str, revision: str | None) -> OmniMoeForCausalLM:
    if not isinstance(source, str):
        return source.eval()
    if source in MODELS and not Path(source).is_dir():
        return load(source, pretrained=True, device=device, dtype=dtype)
    return from_pretrained(source, device=device, dtype=dtype, revision=revision)


def _check_likelihood(config: OmniMoeConfig) -> None:
    is_block = config.mask == "block_causal" and text_of(config) not in config.bidirectional_modalities
    if not is_block and not is_causal_rule(config.mask):
        raise ValueError(f"the mask rule {config.mask!r} lets tokens see later ones, so texts have no likelihood")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*_OWN, *_FOREIGN))


def _key(config: OmniMoeConfig, name: str | None) -> int | None:
    if not config.keys:
        if name is not None:
            raise ValueError(f"key={name!r} for a model without keys; leave it out")
        return None
    if name not in config.keys:
        raise ValueError(f"the copies of this model are picked by {', '.join(config.keys)}; pass key= one of them")
    return config.keys.index(name)


def __getattr__(name: str) -> Any:
    if name == "OmniMoeLM":
        return _adapter()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """The command line of lm-evaluation-harness, with the adapter registered as ``omnimoe``."""
    _adapter()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
