"""What a recipe may say. The docstring below each field is its help text.

Types are strict: a number in quotes is no number, and an unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from oomph.recipe.rules import parse_pattern
from oomph.records import Attention, Checkpointing, Loss, Optimizer, Precision, Quantized, Sharding, VisionCheckpointing


def _expects(expected: str) -> WrapValidator:
    """One sentence instead of one for every member of a union."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", "must be {expected}", {"expected": expected}) from None

    return WrapValidator(check)


def _printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise PydanticCustomError("expected", "must be {expected}", {"expected": "one line of printable text"})
    return text


def _pattern(text: str) -> str:
    parse_pattern(text)
    return text


def _trains(rules: dict[str, float | Literal["frozen"]]) -> dict[str, float | Literal["frozen"]]:
    if all(rate == "frozen" for rate in rules.values()):
        raise ValueError("nothing trains in this stage: at least one rule needs a learning rate")
    return rules


def _distinct_layers(layers: list[int]) -> list[int]:
    if not layers or len(set(layers)) < len(layers):
        raise ValueError("layers are listed once each")
    return layers


def _distinct_stages(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    if not stages:
        raise ValueError("a recipe has at least one stage")
    names = [stage.name for stage in stages]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"stages need different names, and {', '.join(repeated)} is used more than once")
    return stages


Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, AfterValidator(_printable)]
Rate = Annotated[
    Literal["frozen"] | Annotated[float, Field(gt=0, allow_inf_nan=False)],
    _expects("frozen or a learning rate above 0"),
]
Rules = Annotated[dict[Annotated[str, AfterValidator(_pattern)], Rate], AfterValidator(_trains)]
ImageSize = Annotated[
    Count | Annotated[tuple[Count, Count], Field(strict=False)],
    _expects("the pixels of a side or [height, width], in whole numbers from 1"),
]
Layers = Annotated[
    Literal["alternate", "first_half", "second_half", "all"]
    | Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_distinct_layers)],
    _expects("alternate, first_half, second_half, all or a list of different layer numbers from 0"),
]


class Section(BaseModel):
    """A mapping of a recipe. It cannot be changed, only replaced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Parts(Section):
    """A vision-language model put together from its parts."""

    vision: Text
    """The vision tower: a catalogued model, a local folder, or a hub id in the local cache."""
    projector: Annotated[str, Field(pattern=r"^(identity|(pool_)?(linear|mlp[1-9][0-9]?x_gelu))$")]
    """Between tower and language model: `linear`, `identity`, or `mlpNx_gelu` for N linear layers with GELU between.
    `pool_linear` and `pool_mlpNx_gelu` take the mean of two by two patches first."""
    language: Text
    """The language model: a catalogued model, a local folder, or a hub id in the local cache."""
    vision_feature_layer: int = -2
    """The hidden state of the tower that the projector reads; -1 is the last."""
    vision_feature_select: Literal["patch", "full", "drop-first"] = "patch"
    """`patch` drops the class token, where the tower has one, `full` keeps every token. `drop-first` drops the first token
    whatever it is: a patch of SigLIP's, which has no class token, as MoE-LLaVA's 384-pixel models were trained."""


class DataFile(Section):
    """A file of conversations."""

    path: Text
    """LLaVA's JSON or JSONL: objects with `conversations` and, where they have pictures, `image`."""
    images: Text | None = None
    """The folder that pictures are named in; else the file's own."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How often an epoch holds each sample; of a fraction, as many samples of the file."""


class Data(Section):
    """The limits of the data: what one sample may hold. And the data."""

    max_tokens: Count
    """The tokens of the longest sample."""
    image_tokens_count: bool = True
    """Whether image tokens count towards `max_tokens`. If not, the text is cut before the image tokens are spliced in,
    each image then counting as one token, so a sample reaches max_tokens + images · (tokens per image - 1)."""
    images_per_sample: Annotated[int, Field(ge=0)] = 1
    """Images of a sample."""
    samples: Count | None = None
    """Samples of the dataset, for the hours that a stage takes."""
    image_size: ImageSize | None = None
    """Pixels of a side, or [height, width], for models that take images of any size; else the size
    that the model's tower was trained for; grid models take 448 x 448 without it, and Idefics3 four by four tiles."""
    files: list[DataFile] = []
    """What is trained on. Planning needs none."""
    evaluation: list[DataFile] = []
    """What the model is evaluated on."""
    image_aspect_ratio: Literal["pad", "square", "any"] = "pad"
    """How a picture becomes the tower's square: `pad` adds a border, `square` cuts the middle out; `any` leaves it to the
    processor of a model that takes images of any shape."""
    chat_template: Text | None = None
    """`plain`, `vicuna`, or a file with a chat template (Jinja), for tokenizers without one."""


class StageData(Data):
    """The limits that one stage sets otherwise; whatever is not set is as in the recipe's `data`."""

    max_tokens: Count = 1
    """The tokens of the longest sample of this stage."""


class Hardware(Section):
    """What the run is planned for."""

    gpu: Annotated[Text, BeforeValidator(lambda name: str(name) if type(name) is int else name)]
    """The GPU's name, as in `A100-SXM4-40GB`."""
    gpus: Count = 1
    """All GPUs of the run, over all nodes together."""
    nodes: Count = 1
    """The machines that the GPUs are spread over evenly."""
    network_gb_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 25.0
    """What one GPU sends to another machine, in GB/s in one direction; 25 is a port of 200 Gb/s for each GPU."""

    @model_validator(mode="after")
    def _spread(self) -> Self:
        if self.gpus % self.nodes:
            raise ValueError(
                f"gpus counts all GPUs over all nodes, and {self.gpus} cannot be spread evenly over nodes {self.nodes}"
            )
        return self


class Memory(Section):
    """The knobs that memory depends on. `auto` leaves one to the planner; anything else pins it."""

    micro_batch: Annotated[Literal["auto"] | Count, _expects("auto or a whole number from 1")] = "auto"
    """Samples that one GPU takes through forward and backward at a time."""
    checkpointing: Literal["auto", Checkpointing] = "auto"
    """`blocks` keeps only the input of each transformer block and recomputes the rest in backward, `every-2`, `every-3` and
    `every-4` do so with every second, third or fourth block, `blocks-offload` also keeps the inputs in host memory; `none`
    keeps all. Of a vision-language model this is the language model."""
    vision_checkpointing: Literal["auto", VisionCheckpointing] = "auto"
    """The same for the blocks of the vision tower: `blocks` or `none`."""
    attention: Literal["auto", Attention] = "auto"
    """`sdpa` lets PyTorch pick a fused kernel, `flash` and `efficient` name one, `eager` writes out the scores,
    `eager-fp32` writes them out with queries, keys, scores and softmax in float32."""
    loss: Literal["auto", Loss] = "auto"
    """`full` keeps the logits of all tokens, `full-shifted` a shifted copy of them as well, `chunked` those of a
    sixteenth of them at a time."""
    precision: Literal["auto", Precision] = "auto"
    """`bfloat16`, `float16` and `float32`: what weights, activations and gradients are held in. `bfloat16-mixed` and
    `float16-mixed`: weights that train, their gradients and the optimizer in float32, frozen weights in 16 bits, products
    under torch's autocast; `float16-mixed` scales the loss."""
    optimizer: Literal["auto", Optimizer] = "auto"
    """AdamW in one fused kernel, over lists of tensors, or one tensor after the other; or bitsandbytes' with states of
    8 bits, on the GPU or in paged memory."""
    optimizer_offload: Annotated[Literal["auto"] | bool, _expects("auto, true or false")] = "auto"
    """Whether optimizer states live in host memory, where the optimizer then runs."""
    master_weights: Annotated[Literal["auto"] | bool, _expects("auto, true or false")] = "auto"
    """Whether the optimizer updates float32 copies of bfloat16 weights; ZeRO always does. Weights that are float32
    themselves need none."""
    sharding: Literal["auto", Sharding] = "auto"
    """What the GPUs divide between them: `none` on one GPU, `ddp` nothing, `zero1` optimizer states, `zero2` gradients
    too, `zero3` weights too (the zeros as DeepSpeed does them). `fsdp2` is PyTorch's `fully_shard` and divides all
    three, `fsdp2-no-reshard` keeps gathered weights from forward to backward, `fsdp2-hybrid` divides within a node."""
    expandable_segments: Annotated[Literal["auto"] | bool, _expects("auto, true or false")] = "auto"
    """PyTorch's allocator option of that name."""
    eval_batch: Annotated[Literal["auto", "none"] | Count, _expects("auto, none or a whole number from 1")] = "auto"
    """Samples that one GPU evaluates at a time; `none` where the run does not evaluate."""


class Run(Section):
    """How a run is kept, and what happens to what does not fit."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order of the samples, of random weights and of dropout."""
    save_every: Count = 500
    """Steps between two checkpoints; the end of a stage has one too."""
    keep: Count = 2
    """Checkpoints that are kept."""
    evaluate_every: Count | None = None
    """Steps between two evaluations; else the end of each stage has one."""
    too_large: Literal["fail", "skip", "shrink"] = "fail"
    """What happens to a sample that does not fit by itself: the run ends, or goes on without it, or with its images made
    smaller."""
    grow_after: Count = 50
    """Steps without running out of memory after which larger micro-batches are tried again."""
    workers: Annotated[Literal["auto"] | Annotated[int, Field(ge=0)], _expects("auto or a whole number from 0")] = "auto"
    """Threads that read and decode samples ahead."""
    log_to: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where the numbers of each step go beside the run's own files."""


ExpertCount = Annotated[int, Field(ge=2)]


def _counts(value: Any) -> Any:
    """A number of experts or a list of them. What is wrong is one sentence, whichever of them was meant."""
    listed = value if isinstance(value, list) else [value]
    wrong = [count for count in listed if type(count) is not int or count < 2]
    if wrong or not listed:
        expected = "a whole number from 2, or a list of such numbers, one for each layer"
        item = {"item": wrong[0]} if wrong and isinstance(value, list) else {}
        raise PydanticCustomError("expected", "must be {expected}", {"expected": expected, **item})
    return value


class Experts(Section):
    """Upcycling: the feed-forward blocks of some layers become mixtures of experts, each starting as a copy."""

    count: Annotated[ExpertCount | list[ExpertCount], BeforeValidator(_counts)]
    """Experts in each such layer; or a list with the number of each, the first layer first."""
    top_k: Count
    """Experts that see each token. With one, the router learns from the balance alone."""
    layers: Layers = "alternate"
    """`alternate` (the first, the third ...), `first_half`, `second_half`, `all`, or a list of numbers from 0."""
    residual: bool = False
    """Whether each layer keeps its dense block beside the experts, and learns how much of each a token takes."""
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Noise on each expert's copy, in standard deviations of its weights; 0 keeps what the dense model computes."""
    dispatch: Literal["dropless", "capacity"] = "dropless"
    """`dropless` keeps every token, in memory that grows with tokens times `top_k`. `capacity` is planned only, for `top_k` 2:
    the dense tensors of tokens by experts by capacity that DeepSpeed's dispatch makes."""
    capacity_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.5
    """Tokens that an expert may take under `capacity`, in shares of an even load."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        fewest = self.count if isinstance(self.count, int) else min(self.count)
        if self.top_k > fewest:
            which = "count" if isinstance(self.count, int) else "the fewest of count,"
            raise ValueError(f"top_k {self.top_k} is more than {which} {fewest}, the experts there are")
        if self.dispatch == "capacity" and self.top_k != 2:
            raise ValueError(f"dispatch capacity is DeepSpeed's over top_k 2, not {self.top_k}")
        if self.dispatch != "capacity" and self.capacity_factor != type(self).model_fields["capacity_factor"].default:
            raise ValueError("`capacity_factor` is for dispatch capacity: dropless experts take every token")
        return self


class Balance(Section):
    """What keeps the load of experts even, on a stage whose model has experts. Without this section, nothing does."""

    kind: Literal["sequence", "group", "bias", "micro-batch"]
    """`sequence` evens the load of each sample, `group` that of fixed groups of `group` samples; both add a loss. `bias`
    moves a bias of each expert by `bias_rate` once a step, against the load of the step, and adds no loss. `micro-batch`
    evens the load of each micro-batch, as published code does: another cut of a step then trains another loss."""
    coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Of the loss, which is 1 for each layer whose load is even."""
    group: Count = 1
    """Samples of a group."""
    bias_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.001
    """How far a step moves the biases."""
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """The coefficient of the router's z-loss, the mean square of its logits' log-sum-exp over the step's tokens."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.kind == "group" and self.group == 1:
            raise ValueError("kind group needs `group`, the samples that are evened together, from 2")
        fitting = {"group": "group", "bias_rate": "bias"}
        for name, kind in fitting.items():
            if self.kind != kind and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` is for kind {kind}, and kind is {self.kind}")
        return self


class Lora(Section):
    """Low-rank adapters, as PEFT makes them. They are the part `lora` of the model, and train in float32."""

    rank: Count
    """The rank of each adapter."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The adapters' outputs are scaled by alpha / rank; twice the rank without it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' inputs."""
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)],
        _expects("all-linear or a list of modules' names"),
    ] = "all-linear"
    """The linear layers that get an adapter, by the end of their names as in `q_proj`; `all-linear` is every one of the
    language model but its head."""
    target_parameters: list[Text] = []
    """Parameters that get an adapter beside them, by the end of their names, as in `mlp.experts.gate_up_proj`: experts that are
    held in one tensor."""


class Quantization(Section):
    """Frozen weights of linear layers in 8 or 4 bits, as bitsandbytes holds them."""

    kind: Quantized
    """`nf4` has 4 bits a weight and a scale for every 64, `int8` 8 bits and a scale for every row."""
    double_quantization: bool = False
    """Whether the scales of `nf4` are held in 8 bits themselves."""
    upcast: bool = True
    """Whether 16-bit weights that stay as they are become float32, as PEFT's `prepare_model_for_kbit_training` makes them."""
    skip: list[Text] = []
    """Modules that are not quantized, by a part of their names. The head, and layers whose weights train, never are."""


class Stage(Section):
    """One stage of training."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """The stage's name: letters, digits, `-` and `_`."""
    train: Rules
    """What trains: `pattern: learning rate` or `pattern: frozen`. Every parameter is matched by exactly one rule."""
    effective_batch: Count
    """Samples of one optimizer step, over all GPUs and micro-batches."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Passes over the data."""
    steps: Count | None = None
    """Steps after which the stage ends, where its epochs have not ended it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rates fall to zero after the warm-up, if they do."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """The share of the steps in which the learning rates rise."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """AdamW's decay of weights; biases and norms have none."""
    max_grad_norm: Annotated[
        Literal["none"] | Annotated[float, Field(gt=0, allow_inf_nan=False)], _expects("none or a number above 0")
    ] = 1.0
    """The gradient is clipped to this norm."""
    data: StageData = Field(default_factory=StageData)
    """Limits of the data that differ in this stage."""
    memory: Memory = Field(default_factory=Memory)
    """Memory knobs that differ in this stage."""
    experts: Experts | None = None
    """The experts, on a stage that upcycles the model before it trains."""
    balance: Balance | None = None
    """What keeps the load of experts even, on a stage whose model has experts."""
    lora: Lora | None = None
    """The adapters, on a stage that trains some."""
    quantization: Quantization | None = None
    """What frozen weights are held in, on a stage that quantizes them."""


def _name_or_parts(value: Any) -> str:
    return "parts" if isinstance(value, dict | Parts) else "name"


Model = Annotated[
    Annotated[Text, _expects("a model's name, or its parts vision, projector and language"), Tag("name")]
    | Annotated[Parts, Tag("parts")],
    Discriminator(_name_or_parts),
]


class Recipe(Section):
    """What the user wants: a model, the stages that train it, the limits of the data, the hardware."""

    name: Text
    """The recipe's name, as reports show it."""
    model: Model
    """One name (a catalogued model, a local folder, or a hub id in the local cache), or the parts of a model."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """What training starts from: the weights in the model's folders, or random ones. Planning reads none."""
    tokenizer: Text | None = None
    """The folder of the tokenizer; else that of the model, or of its language part."""
    data: Data
    """The limits of the data, and the data."""
    hardware: Hardware
    """What the run is planned for."""
    memory: Memory = Field(default_factory=Memory)
    """Memory knobs of every stage that does not set its own."""
    run: Run = Field(default_factory=Run)
    """How a run is kept."""
    stages: Annotated[tuple[Stage, ...], Field(strict=False), AfterValidator(_distinct_stages)]
    """The stages, in the order in which they run."""


KNOBS = tuple(Memory.model_fields)
SECTIONS: dict[str, type[Section]] = {
    "": Recipe,
    "model": Parts,
    "data": Data,
    "files": DataFile,
    "hardware": Hardware,
    "memory": Memory,
    "run": Run,
    "stages": Stage,
    "experts": Experts,
    "balance": Balance,
    "lora": Lora,
    "quantization": Quantization,
}


def data_of(recipe: Recipe, stage: Stage) -> Data:
    """The stage's limits: its own where it sets them, else the recipe's."""
    return recipe.data.model_copy(update={name: getattr(stage.data, name) for name in stage.data.model_fields_set})


def memory_of(recipe: Recipe, stage: Stage) -> Memory:
    """The stage's memory knobs: its own where it sets them, else the recipe's."""
    return recipe.memory.model_copy(update={name: getattr(stage.memory, name) for name in stage.memory.model_fields_set})
