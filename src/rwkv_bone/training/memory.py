"""How many bytes a training run needs, computed from the model's shape: for --grad_cp auto and the pages.

For a run that trains an adapter on one device (ZeRO stage 1 or 2; `share_of` says what several devices change):

    weights     every frozen tensor in --precision; with --quant the projections as codes and scales
    trained     12 bytes a parameter: the parameter and AdamW's two moments, all fp32
    kept        what autograd keeps of each layer and token for backward: `kept_by_layer`. Of a block that is computed
                again only its input; with chunk_ctx of one chunk, and the state of each layer at each boundary
    passing     the most that is there beside weights and trained: what is kept at one time, gradients so far, 4 bytes a
                trained parameter, and what is worked in. Backward frees the one while it makes the other, so the most
                is at its beginning, at its end, or where the blocks begin that are computed again; or in the head, with
                its logits; or in the optimiser's step, 8 bytes a trained parameter
    reserve     on a GPU a tenth of all that for gaps between tensors, and 0.7 GB for CUDA itself and cuBLAS

On a CPU all of the process counts, as the system counts it (its peak resident memory): what it has resident when it is
asked, without the model; what it loads later; and what its allocator keeps of freed memory (REPEATS).

Where answers are compared (--task dpo and its kin) a sample may be a pair, of twice the tokens. The loss of each token
keeps a row of width C for each until backward, as the sum of the losses does. The passes without a gradient, those of
the reference and of KTO's other answers, have no more tokens and keep nothing: they take less.

What only few runs have is estimated from above. tests/test_memory_page.py holds `kept_by_layer` to what autograd keeps
on a processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from rwkv_bone.adapters import AdapterLinear
from rwkv_bone.adapters.registry import split_key
from rwkv_bone.allocator import GROWTH
from rwkv_bone.checkpoints import Architecture
from rwkv_bone.models import RWKV, Recompute
from rwkv_bone.models.layers import keeps_input
from rwkv_bone.models.rwkv import Block
from rwkv_bone.ops.cross_entropy import rows_at_a_time
from rwkv_bone.ops.sizes import CPU, EXACT, FLOAT, saved_floats, workspace_floats
from rwkv_bone.quantization import BLOCK, CHUNK_CPU, CHUNK_GPU, QuantLinear, is_quantized
from rwkv_bone.training.strategy import DTYPES, bucket_size

GB = 2**30  # as cards are sold
VALUE_BYTES, MOMENT_BYTES, GRADIENT_BYTES, STEP_BYTES = 4, 8, 4, 8
TRAINED_BYTES = VALUE_BYTES + MOMENT_BYTES
WHOLE_BLOCKS = 1.5  # at stage 3: the one in use, and what is fetched ahead (place.py)
GAPS, CUDA_BYTES = 0.10, 7 * 10**8
# On a CPU the memory that comes and goes while a block is worked on lies in the heap so many times more. PyTorch asks
# glibc for aligned blocks: for n bytes glibc looks for n + 96, and what is over it frees as blocks of their own, which
# small objects then take. So a freed block does not serve the next request of its size: only two side by side do, and
# what is left of these is too small again.
REPEATS = 2
# What a process takes on a GPU beside tensors once its free memory is looked at: libraries and their kernels.
RESERVE = GB // 4
MB = 2**20
# Memory of a process on a CPU beside tensors, measured by benchmarks/plan.py --parts. Before the model: Python,
# PyTorch and Lightning 245 MB, the World tokenizer 235. Then: DeepSpeed 21 MB; its engine, the prefetching thread and
# the kernels that oneDNN makes 33. Where blocks or chunks are computed again: torch.utils.checkpoint imports the
# compiler, 82, unless something has: with some versions of its requirements, Lightning does.
RESIDENT, STARTED, CHECKPOINT = 480 * MB, 54 * MB, 82 * MB

SHELL_ROWS = 3  # rows of width C that the model keeps around its blocks, RWKV-7's v_first among them
# Rows of width C that the backward pass of a time mix and of a channel mix work in, beside those of width dim_ffn.
TIME_ROWS, CHANNEL_ROWS = 19, 3
# Of each token a block keeps so many numbers of width C, besides relu squared's input of width dim_ffn: the inputs of
# its two norms and what its projections gave; RWKV-6 and 5 also both factors of the channel mix's result, and RWKV-6
# the input of its time mix.
ROWS = {7: 2 + 3, 6: 2 + 4 + 2 + 1, 5: 2 + 4 + 2}
NORMS = 4  # numbers of each token: mean and scale of the two norms
SHARES = {7: 7, 6: 8, 5: 6}  # fp32 numbers of width C that do not depend on the tokens: how much each lerp mixes


@dataclass(frozen=True)
class Run:
    """The settings of train.py that memory depends on, besides the model and what is trained of it."""

    ctx_len: int = 4096
    micro_bsz: int = 1
    quant: str = "none"
    recompute: Recompute = Recompute()
    chunk_ctx: int = 0
    precision: str = "bf16"
    device: str = "cuda"
    accumulate: int = 1  # forward passes of a step
    document: int = 0  # mean tokens of a document, where all rows are packed into one; 0: they are not
    stage: int = 1  # of ZeRO
    ranks: int = 1  # processes, on all machines
    offload: bool = False  # the optimiser's state, and at stage 3 the weights, lie in the CPU's memory
    resident: int = RESIDENT  # bytes of the process without the model, on a CPU
    compiler: bool = False  # the process has PyTorch's compiler in memory already, on a CPU
    keeps: bool = True  # on a CPU: the allocator keeps what is freed (allocator.py)
    members: int = 1  # sequences of a sample: 2 of a pair of answers, which are in one forward pass

    @property
    def rows(self) -> int:
        return 1 if self.document else self.micro_bsz * self.members

    @property
    def whole(self) -> int:
        """Tokens of a row."""
        return self.ctx_len * (self.micro_bsz * self.members if self.document else 1)

    @property
    def length(self) -> int:
        """Tokens of a row that go through the model at once."""
        return min(self.chunk_ctx or self.whole, self.whole)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model at once."""
        return self.length * self.rows

    @property
    def width(self) -> int:
        """Bytes of a number of the frozen weights and of the activations."""
        return DTYPES[self.precision].itemsize


class Moment(NamedTuple):
    """Bytes that are there beside weights and what is trained."""

    activations: float = 0  # what is kept for backward, and what a block's backward works in
    gradients: float = 0  # and buckets, and what the optimiser's step works in
    head: float = 0  # logits
    renewed: float = 0  # of all these, what comes and goes while a block is worked on

    @property
    def size(self) -> float:
        return self.activations + self.gradients + self.head


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    weights: float
    values: float  # of what is trained
    optimiser: float  # its moments, and what else it has of its own between steps
    kept: float
    moments: tuple[Moment, ...]  # those among which is the one with the most

    @property
    def trained(self) -> float:
        return self.values + self.optimiser

    @property
    def passing(self) -> float:
        return max(moment.size for moment in self.moments)

    @property
    def total(self) -> float:
        """The most that tensors take."""
        return self.weights + self.trained + self.passing

    @property
    def card(self) -> float:
        """What the card must have."""
        return self.total * (1 + GAPS) + CUDA_BYTES


@dataclass(frozen=True)
class Parts:
    """Bytes of a run at the moment when it has the most, by what they are for.

    On a GPU `total` is what the card must have, `Needs.card`; on a CPU the most memory that the process has resident.
    What is not there at that moment counts as nothing: either the head works, or a block's backward, or the optimiser.
    """

    weights: float  # frozen
    adapter: float  # values of what is trained
    optimiser: float  # AdamW's moments, and on what it steps
    gradients: float  # and the buckets in which they are reduced
    activations: float  # what forward keeps for backward, and what a block's backward works in
    head: float  # logits of the tokens that go through it together
    framework: float  # Python, PyTorch and the other libraries; on a GPU CUDA and cuBLAS
    slack: float  # gaps between tensors

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Counted:
    """A model with its adapter, in numbers."""

    projections: int  # weights of the frozen projections
    rows: int  # of all of these: int8 has a scale for each
    largest: int  # weights of the largest of them
    others: int  # other frozen weights
    trained: int
    adapter: int  # of these, the adapter's, which are proportional to its r
    casts: int  # weights of trained matrices of the base, of which backward needs a copy in --precision
    inputs: int  # rows of width C that a block keeps because projections or trained lerps need their input
    products: int  # numbers of each token that a block's adapters keep of their own


def count(model: RWKV) -> Counted:
    """Count a model, which may be quantised, or have no memory yet (torch.device("meta"))."""
    shapes, others, trained, adapter, casts = [], 0, 0, 0, 0
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
            adapter += parameter.numel() if split_key(key) else 0
            casts += parameter.numel() if parameter.dim() > 1 and not split_key(key) else 0
        elif is_quantized(key):
            shapes.append(tuple(parameter.shape))
        else:
            others += parameter.numel()
    shapes += [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, QuantLinear)]
    sizes = [rows * columns for rows, columns in shapes]
    block = model.blocks[-1]
    return Counted(
        projections=sum(sizes),
        rows=sum(rows for rows, _ in shapes),
        largest=max(sizes, default=0),
        others=others,
        trained=trained,
        adapter=adapter,
        casts=casts,
        inputs=_inputs_kept(block, model.arch.version),
        products=sum(_products(layer) for layer in block.modules() if isinstance(layer, AdapterLinear)),
    )


def _inputs_kept(block: nn.Module, version: int) -> int:
    """See Counted. From the input of a mix all its lerps are made again, and relu squared from its own input."""
    assert isinstance(block, Block)
    kept = int(keeps_input(block.att.output))
    for mix, last in ((block.att, block.att.output), (block.ffn, block.ffn.value)):
        mixes = any(p.requires_grad for p in mix.parameters(recurse=False))
        needed = mixes or any(keeps_input(layer) for layer in mix.children() if layer is not last)
        kept += needed and not (version == 6 and mix is block.att)  # which is kept anyway
    return kept


def _products(layer: AdapterLinear) -> int:
    """Bone keeps the folded input, LoRA its product with A; with dropout also the input that is left and a mask."""
    r = 0 if "bat" in layer.settings.kind else layer.settings.r
    return r + (2 * layer.in_features if layer.settings.dropout else 0)


def weight_bytes(count: Counted, run: Run) -> float:
    """Bytes of the frozen weights."""
    codes = {
        "none": count.projections * run.width,
        "int8": count.projections + 4 * count.rows,
        "nf4": count.projections * (0.5 + 4 / BLOCK),
        "fp4": count.projections * (0.5 + 4 / BLOCK),
    }
    return count.others * run.width + codes[run.quant]


def needed(arch: Architecture, count: Counted, run: Run) -> float:
    """Bytes of the device that this run must be able to have: on a GPU free ones, on a CPU what it has included."""
    if run.device == "cpu":
        return parts(arch, count, run).total
    return needs(arch, count, run).total * (1 + GAPS) + RESERVE


def parts(arch: Architecture, count: Counted, run: Run) -> Parts:
    """What this run needs at the moment when it has the most, by part."""
    found = needs(arch, count, run)
    if run.device == "cuda":
        most, framework, slack = max(found.moments, key=lambda moment: moment.size), CUDA_BYTES, found.total * GAPS
    else:
        times = REPEATS if run.keeps else 0
        most = max(found.moments, key=lambda moment: moment.size + times * moment.renewed)
        slack = times * most.renewed
        checkpoint = CHECKPOINT if (run.recompute.blocks or run.chunk_ctx) and not run.compiler else 0
        framework = run.resident + STARTED + checkpoint
        if run.keeps:
            # Between two trims the heap grows by up to GROWTH: half of that is the least error.
            slack += GROWTH / 2 * (found.weights + found.values + found.optimiser + most.size + framework + slack)
    return Parts(
        weights=found.weights,
        adapter=found.values,
        optimiser=found.optimiser,
        gradients=most.gradients,
        activations=most.activations,
        head=most.head,
        framework=framework,
        slack=slack,
    )


def kept_by_layer(arch: Architecture, count: Counted, run: Run, wkv: bool = False) -> float:
    """Bytes that autograd keeps of one layer, but the first, which keeps less. wkv: the operator is run again."""
    C, rank = arch.n_embd, arch.low_rank
    # The hidden layers of the low-rank networks.
    hidden = {7: sum(rank.values()), 6: 5 * rank.get("mix", 0) + rank.get("decay", 0), 5: 0}[arch.version]
    numbers = (ROWS[arch.version] + count.inputs) * C + arch.dim_ffn + NORMS + hidden + count.products
    scratch = 0
    if not wkv:
        numbers += C  # what the operator gave
        scratch = FLOAT * saved_floats(*operator_sizes(arch, run))
    return numbers * run.width * run.tokens + scratch + FLOAT * SHARES[arch.version] * C


def operator_sizes(arch: Architecture, run: Run) -> tuple[str, str, int, int, int, int, int]:
    """A call of the WKV operator, as ops/sizes.py takes it. All chunked kernels of a GPU have about the same needs."""
    kernels = CPU if run.device == "cpu" else EXACT if run.precision == "fp32" else "chunked32"
    documents = -(-run.length // run.document) if run.document else 0
    return f"wkv{arch.version}", kernels, run.rows, run.length, arch.n_head, arch.head_size, documents


def in_backward(arch: Architecture, count: Counted, run: Run) -> float:
    """Bytes that the backward pass of a block works in, beside what the block has kept."""
    C, row = arch.n_embd, run.tokens * run.width
    # The channel mix comes first: what it has kept is free again when the time mix works.
    time = (TIME_ROWS * C - arch.dim_ffn) * row + FLOAT * workspace_floats(*operator_sizes(arch, run))
    again = bool(count.inputs)  # relu squared is there once more where a projection needs its input
    channel = (CHANNEL_ROWS * C + (2 + again) * arch.dim_ffn) * row
    if run.quant == "none":
        return max(time, channel)
    chunk = 6 * min(CHUNK_GPU if run.device == "cuda" else CHUNK_CPU, count.largest)
    # The largest projection is dequantised beside relu squared or its gradient.
    dequantised = (2 * C + (1 + again) * arch.dim_ffn) * row + count.largest * run.width + chunk
    return max(time, channel, dequantised)


@dataclass(frozen=True)
class Share:
    """Bytes of a process for what ZeRO divides among processes."""

    weights: float  # frozen
    values: float  # of what is trained
    trained: float  # between steps, these values included
    working: float  # in forward and backward: buckets, and at stage 3 what is whole at a time
    gradients: float  # after backward
    made_at_once: bool  # that memory is taken when backward begins
    step: float  # in the optimiser's step, gradients included


def share_of(arch: Architecture, count: Counted, run: Run) -> Share:
    """What ZeRO leaves to each of `run.ranks` processes. In the stages' order more and more is a share.

    Of what is offloaded a GPU holds nothing; on a CPU both parts lie in the same memory.
    """
    n, weights = run.ranks, weight_bytes(count, run)
    values, gradients = VALUE_BYTES * count.trained, GRADIENT_BYTES * count.trained
    hosted = run.offload and run.device == "cuda"  # the optimiser's state is in another memory
    moments = 0 if hosted else MOMENT_BYTES * count.trained / n
    largest = 4 * min(count.trained, arch.vocab_size * arch.n_embd)
    bucket = 4 * bucket_size(count.trained, n)
    buckets = (3 if run.device == "cuda" and n > 1 else 2) * bucket  # one is filled, one reduced, in a copy
    if run.stage < 3 and not run.offload:
        if n == 1:
            return Share(weights, values, values + moments, 0, gradients, False, STEP_BYTES * count.trained)
        # gloo gathers the new values in a copy.
        step = max(STEP_BYTES * count.trained / n, values if run.device == "cpu" else 0)
        if run.stage == 1:
            return Share(weights, values, values + moments, bucket, gradients * (1 + 1 / n), run.accumulate > 1, step)
        return Share(weights, values, values + moments, buckets, gradients / n, True, step)
    if run.stage < 3:
        # A second copy of the values, which is what AdamW steps on, and gradients, always.
        master = 0 if hosted else (VALUE_BYTES + GRADIENT_BYTES) * count.trained / n
        buffers = largest * (1 if hosted else 2)
        step = values if run.device == "cpu" and n > 1 else 0
        return Share(weights, values, values + moments + master + buffers, buckets, 0, True, step)
    quantised = count.projections if run.quant != "none" else 0  # these are not divided
    elements = count.others + count.projections - quantised + count.trained
    divided = (elements - count.trained) * run.width
    whole = weights - divided
    shells = 2 * arch.vocab_size * arch.n_embd
    one = max(WHOLE_BLOCKS * max(elements - shells, 0) / arch.n_layer, shells / 2)
    at_a_time = one * (divided + values) / elements
    if hosted:
        return Share(whole, 0, bucket, at_a_time + buckets, 0, True, 0)
    if run.device == "cpu" and n > 1:
        at_a_time, buckets = 2 * at_a_time, buckets + bucket  # gloo gathers and reduces in copies
    kept = values / n + moments + gradients / n + bucket
    if run.offload:
        return Share(whole + divided / n, values / n, kept + gradients / n, at_a_time + buckets, 0, True, 0)
    return Share(whole + divided / n, values / n, kept, at_a_time + buckets, 0, True, gradients / n)


def needs(arch: Architecture, count: Counted, run: Run) -> Needs:
    """What a run needs of the memory that its device computes in."""
    row = run.tokens * run.width  # bytes of one number a token
    layers, again = arch.n_layer, min(run.recompute.blocks, arch.n_layer)
    whole = kept_by_layer(arch, count, run)
    stays = kept_by_layer(arch, count, run, run.recompute.wkv)
    around = SHELL_ROWS * arch.n_embd * row
    if run.chunk_ctx:
        state = 4 * arch.n_embd * (arch.head_size + 2)  # of one layer: the WKV state, and the last row of each mix
        around += -(-run.whole // run.length) * run.rows * layers * state
    logits = min(run.tokens, rows_at_a_time(arch.vocab_size, run.device, trained=False))
    share = share_of(arch, count, run)
    backward = in_backward(arch, count, run)

    def kept_by(blocks: int) -> float:
        """Of the first blocks."""
        return around + min(blocks, again) * arch.n_embd * row + max(blocks - again, 0) * stays

    def while_in(block: int) -> Moment:
        """In the backward pass of this block, the first of which is 1."""
        anew = whole if block <= again else whole - stays
        made = share.gradients * (1 if at_once else 1 - (block - 1) / layers)
        renewed = whole + backward + GRADIENT_BYTES * count.trained
        return Moment(kept_by(block) + anew + backward, made + share.working, renewed=renewed)

    at_once = share.made_at_once or run.accumulate > 1
    earlier = share.working + (share.gradients if at_once else 0)
    # Of the copies in --precision of trained matrices, those of blocks that are computed again are made again.
    casts = count.casts * run.width * max(layers - again, 1) / layers if run.precision != "fp32" else 0
    blocks = {1, again, again + 1, layers} & set(range(1, layers + 1))
    moments = [Moment(kept_by(layers), earlier, arch.vocab_size * logits * run.width), Moment(gradients=share.step)]
    moments += map(while_in, sorted(blocks))
    return Needs(share.weights + casts, share.values, share.trained - share.values, kept_by(layers), tuple(moments))
