"""Subnetworks of models that run under a backend of ``torch.compile``, those of Hugging Face above all."""

from __future__ import annotations

import copy
import gc
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.dynamo.backend import Backend
from fx_approx.errors import UnsupportedError
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.sampling import Selection
from fx_approx.schedules import ExactTail, ExactWarmup, PlanRatios
from fx_approx.subnetworks import (
    Phases,
    extract,
    load,
    merge,
    narrow_optimizer,
    record_of,
    reselect,
    save,
    widen_optimizer,
)
from fx_approx.subnetworks.part_layers import PartLayer
from tests.subnetworks.backend_models import (
    HALF,
    Made,
    bert,
    compiled,
    distilbert,
    gpt2,
    largest,
    llama,
    loss_of,
    restore,
    steps,
    tokens,
    transformers,
    vit,
)

pytestmark = [
    # Graphs without anything to sample, as those of embeddings, say so.
    pytest.mark.filterwarnings("ignore:a graph stays exact"),
    # Dynamo looks at it on the tensors that it resumes with.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def assert_trains_alike(made: tuple[Any, Backend, Any], tolerance: float = 1e-10) -> Any:
    """The subnetwork's training, merged, is that of the compiled model under one kept selection; returns it."""
    model, backend, batch = made
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sub = extract(backend, example_inputs=batch)
    assert type(sub) is type(model) and record_of(sub).own_forward and not record_of(sub).reason
    assert sum(p.numel() for p in sub.parameters()) < sum(p.numel() for p in model.parameters())
    steps(sub, torch.optim.SGD(sub.parameters(), 1e-3), batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "not yet"
    merge(sub, model)
    merged = copy.deepcopy(model)
    restore(model, before)
    with fx_approx.reuse_selection(backend):
        steps(model, torch.optim.SGD(model.parameters(), 1e-3), batch)
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters())
    assert moved > 0 and largest(merged, model) <= tolerance * moved
    return sub


# ---- the same training, in the user's own class

SLOW = pytest.mark.slow


@pytest.mark.parametrize("build", [bert, pytest.param(distilbert, marks=SLOW), pytest.param(vit, marks=SLOW)])
def test_plain_sgd_is_that_of_the_compiled_model_under_one_selection(build: Callable[[], Made]) -> None:
    made = compiled(build)
    sub = assert_trains_alike(made)
    heads = [value for module in sub.modules() for name, value in vars(module).items() if name.endswith("heads")]
    assert set(heads) == {2}
    # Heads of another size would follow from a config with fewer of them.
    assert sub.config.to_dict() == made[0].config.to_dict() and sub.config is not made[0].config
    assert "no config of its class describes it" in record_of(sub).notes[0]


@pytest.mark.slow
def test_layers_that_store_their_weight_transposed_and_sizes_of_heads_in_attributes() -> None:
    sub = assert_trains_alike(compiled(gpt2, Override({"*c_proj": HALF}, Exact())))
    block = sub.transformer.h[0]
    assert [(layer.nx, layer.nf) for layer in (block.attn.c_attn, block.attn.c_proj)] == [(64, 96), (32, 64)]
    assert (block.attn.split_size, block.attn.num_heads, block.attn.embed_dim) == (32, 2, 64)
    assert block.mlp.c_fc.weight.shape == (64, 128) and block.mlp.c_fc.weight.is_contiguous()
    assert sub.generate(tokens()[:2], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 11)


class Tied(nn.Module):
    """A language model of one table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(self.embedding(ids)).flatten(0, 1), ids.flatten())


def tied() -> Made:
    return Tied(), {"ids": torch.randint(20, (4, 8))}


@pytest.mark.parametrize(("build", "table"), [(tied, "embedding"), pytest.param(gpt2, "transformer.wte", marks=SLOW)])
def test_tied_weights_of_which_one_place_would_be_narrow_are_named(build: Callable[[], Made], table: str) -> None:
    _, backend, batch = compiled(build, Override({"lm_head": HALF}, Exact()))
    with pytest.raises(UnsupportedError, match=rf"{re.escape(table)}\.weight is narrowed by one reader and read whole"):
        extract(backend, example_inputs=batch)


@pytest.mark.slow
def test_heads_that_share_keys_go_in_whole_groups() -> None:
    # Its norms are in float32, where sums of the gradients differ in order.
    sub = assert_trains_alike(compiled(llama), tolerance=1e-6)
    attention = sub.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 16)


def test_the_config_follows_and_the_model_is_saved_and_loaded_again(tmp_path: Path) -> None:
    made = compiled(llama, Override({"*o_proj": HALF, "*down_proj": HALF}, Exact()))
    sub, (model, _, batch) = assert_trains_alike(made), made
    assert sub.model.layers[0].self_attn.k_proj.weight.shape == (16, 64), "heads that share keys go together"
    assert record_of(sub).notes == ()
    config = sub.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 64)
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 128)
    sub.save_pretrained(tmp_path)
    again = type(sub).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again.eval()(**batch).logits, sub.eval()(**batch).logits)
    prompt = batch["input_ids"][:2, :4]
    tokens = sub.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    assert tokens.shape == (2, 8)
    assert torch.equal(
        tokens, again.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (bert, "*output.dense"),
        pytest.param(gpt2, "*mlp.c_proj", marks=SLOW),
        pytest.param(distilbert, "*lin2", marks=SLOW),
        pytest.param(vit, "*fc2", marks=SLOW),
    ],
)
def test_hidden_units_are_in_the_config(build: Callable[[], Made], layer: str, tmp_path: Path) -> None:
    _, backend, batch = compiled(build, Override({"*attention*": Exact(), layer: HALF}, Exact()))
    sub = extract(backend, example_inputs=batch)
    assert record_of(sub).notes == ()
    sub.save_pretrained(tmp_path)
    again = type(sub).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.num_parameters() == sub.num_parameters() < backend.models[0].num_parameters()
    assert torch.equal(again.eval()(**batch).logits, sub.eval()(**batch).logits)


@pytest.mark.slow
def test_a_trainer_takes_a_subnetwork_as_any_model(tmp_path: Path) -> None:
    library = transformers()
    pytest.importorskip("accelerate")
    model, backend, batch = compiled(bert)
    sub = extract(backend, example_inputs=batch).float()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    before = sub.bert.pooler.dense.weight.detach().clone()
    how = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    library.Trainer(sub, library.TrainingArguments(str(tmp_path), **how), train_dataset=rows).train()
    assert not torch.equal(sub.bert.pooler.dense.weight, before)
    merge(sub, model)
    assert record_of(sub).merged


# ---- models of the user's own


class Attention(nn.Module):
    """Names its sizes in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size, self.inner = 4, 8, 32
        self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.inner, 2)
        q, k, v = (t.view(*x.shape[:2], self.heads, self.size).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.inner)
        return x + self.out(mixed)


class Blocks(nn.Module):
    """With a break of the graph behind each block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList([Attention(), Attention()])
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention[0](x)
        torch._dynamo.graph_break()
        x = self.attention[1](x)
        torch._dynamo.graph_break()
        return (x + self.down(F.gelu(self.up(self.norm(x))))).square().mean()


class Looped(Blocks):
    """Whose own frame Dynamo leaves to Python."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.attention:
            x = block(x)
            torch._dynamo.graph_break()
        return (x + self.down(F.gelu(self.up(self.norm(x))))).square().mean()


def blocks() -> Made:
    return Blocks(), {"x": torch.randn(4, 5, 16)}


def test_several_graphs_and_attributes_that_name_sizes() -> None:
    sub = assert_trains_alike(compiled(blocks, Override({"*out": HALF, "down": HALF}, Exact())))
    assert [(block.heads, block.size, block.inner) for block in sub.attention] == [(2, 8, 16)] * 2
    assert len(record_of(sub).graphs) == 3, "one for each part between the breaks"
    assert (sub.up.out_features, sub.down.in_features) == (32, 32)


def test_where_only_parts_of_a_forward_are_compiled_the_rest_stays_whole() -> None:
    sub = assert_trains_alike(compiled(lambda: (Looped(), {"x": torch.randn(4, 5, 16)})))
    assert len(record_of(sub).graphs) == 2 and sub.up.weight.shape == (64, 16)


def test_given_selections_go_to_the_graphs_in_order() -> None:
    model, backend, batch = compiled(blocks, Override({"*out": HALF, "down": HALF}, Exact()))
    chosen = [Selection(torch.tensor([index]), None) for index in ([0, 3], [1, 2], list(range(10, 42)))]
    sub = extract(backend, chosen, example_inputs=batch)
    assert torch.equal(sub.up.weight, model.up.weight[10:42])
    assert torch.equal(sub.attention[1].out.weight, model.attention[1].out.weight[:, 8:24])
    for wrong in (chosen[:2], [*chosen, None]):
        with pytest.raises(ValueError, match="selections: expected"):
            extract(backend, wrong, example_inputs=batch)


# ---- back, and again


def test_other_selections_come_into_the_same_tensors() -> None:
    model, backend, batch = compiled(blocks)
    sub = extract(backend, example_inputs=batch)
    assert any(isinstance(module, PartLayer) for module in sub.modules()), "wide values are read in part"
    tensors = {id(t) for t in (*sub.parameters(), *sub.buffers())}
    with pytest.raises(ValueError, match="first"):
        reselect(sub, backend)
    merge(sub, backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(-1))
    with pytest.raises(ValueError, match="expected the backend"):
        reselect(sub, model)
    reselect(sub, backend)
    assert {id(t) for t in (*sub.parameters(), *sub.buffers())} == tensors
    fresh = extract(backend, example_inputs=batch)
    assert all(torch.equal(t, sub.state_dict()[name]) for name, t in fresh.state_dict().items())
    assert loss_of(sub, batch).item() == loss_of(fresh, batch).item()


def test_an_optimiser_goes_along_and_nothing_is_half_written() -> None:
    model, backend, batch = compiled(blocks)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps(model, optimizer, batch, 2)
    sub = extract(backend, example_inputs=batch)
    copied = torch.load(pickled(sub), weights_only=False)
    assert loss_of(copied, batch).item() == loss_of(sub, batch).item()
    narrow_optimizer(optimizer, sub, model)
    steps(sub, optimizer, batch, 2)
    merge(sub, model)
    widen_optimizer(optimizer, sub)
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    with pytest.raises(ValueError, match="written back before"):
        merge(sub, model)
    sub = extract(backend, example_inputs=batch)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cut out of another model"):
        merge(sub, Attention())
    with torch.no_grad():
        model.up.weight.add_(1.0)
    before["up.weight"] += 1.0
    with pytest.raises(ValueError, match=r"up\.weight was changed since"):
        merge(sub, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_a_compiled_model_is_refused_and_changes_nothing() -> None:
    model, backend, batch = compiled(blocks)
    sub = extract(backend, example_inputs=batch)
    merge(sub, backend)
    before = copy.deepcopy(sub.state_dict())
    chosen = list(record_of(sub).selections)
    first = chosen[0]
    assert first is not None
    for wrong, error, message in (
        ([*chosen, None], ValueError, "selections: expected"),
        ([first.indices, *chosen[1:]], TypeError, r"selections\[0\]: expected a Selection or None, got a Tensor"),
        ([Selection(first.indices + 999, None), *chosen[1:]], ValueError, r"selections\[0\]: expected indices from 0"),
        ([Selection(first.indices[:, 1:], None), *chosen[1:]], ValueError, "another ratio needs another subnetwork"),
    ):
        with pytest.raises(error, match=message):
            reselect(sub, backend, wrong)
    fx_approx.set_sampling(backend, 0.25)
    with pytest.raises(ValueError, match=r"expected .*, which it has in sub: another ratio needs another subnetwork"):
        reselect(sub, backend)
    assert all(torch.equal(value, before[name]) for name, value in sub.state_dict().items()) and record_of(sub).merged
    other = torch.optim.AdamW(Blocks().parameters())
    for schedule in (PlanRatios(), ExactWarmup(PlanRatios(), 2)):
        with pytest.raises(ValueError, match=r"none of its \d+ parameters is one of model"):
            Phases(backend, other, schedule, example_inputs=batch)
        with pytest.raises(UnsupportedError, match="LBFGS keeps directions"):
            Phases(backend, torch.optim.LBFGS(model.parameters()), schedule, example_inputs=batch)
    with pytest.raises(ValueError, match=r"none of its \d+ parameters is one of model"):
        narrow_optimizer(other, sub, backend)


@pytest.mark.slow
def test_a_stored_one_is_written_back_and_goes_on() -> None:
    model, backend, batch = compiled(llama, Override({"*down_proj": HALF}, Exact()))
    sub, stream = extract(backend, example_inputs=batch), io.BytesIO()
    save(sub, stream)
    stream.seek(0)
    again = load(stream, model)
    assert loss_of(again, batch).item() == loss_of(sub, batch).item()
    steps(again, torch.optim.SGD(again.parameters(), 1e-2), batch, 1)
    merge(again, model)
    reselect(again, backend)
    fresh = extract(backend, example_inputs=batch)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in fresh.state_dict().items())


def pickled(module: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return stream


def phases_of(made: tuple[Any, Backend, Any], stop: int, resume: Any = None, forget: bool = False) -> Any:
    """Losses and widths of the steps to ``stop``, a checkpoint, and the phases."""
    model, backend, batch = made
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = ExactTail(ExactWarmup(PlanRatios(), 2), total=9, steps=2)
    phases = Phases(backend, optimizer, schedule, interval=3, example_inputs=batch)
    if resume is not None:
        model.load_state_dict(resume["model"])
        fx_approx.load_sampler_state_dict(backend, resume["sampler"])
        phases.load_state_dict(resume["phases"])
        optimizer.load_state_dict(resume["optimizer"])
    steps: list[tuple[int, float]] = []
    while phases.last_step < stop:
        if forget and phases.last_step == 4:
            torch._dynamo.reset()
            gc.collect()
        width = phases.model.down.weight.shape[1]
        loss = loss_of(phases.model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append((width, loss.item()))
        phases.step()
    sampler, states = fx_approx.sampler_state_dict(backend), (model, phases, optimizer)
    state = dict(zip(("model", "phases", "optimizer"), (one.state_dict() for one in states), strict=True))
    return steps, copy.deepcopy({**state, "sampler": sampler}), phases


@pytest.mark.slow
def test_phases_of_a_compiled_model_resume_bitwise_and_outlive_its_code() -> None:
    made = compiled(blocks)
    steps, _, phases = phases_of(made, 9)
    assert [width for width, _ in steps] == [64] * 2 + [32] * 5 + [64] * 2
    assert steps[7][1] < steps[6][1] < steps[0][1], "no jump where the full model takes over"
    assert phases.finish() is made[0]
    first, state, _ = phases_of(compiled(blocks), 6)
    second, _, _ = phases_of(compiled(blocks), 9, state)
    assert first + second == steps
    assert phases_of(compiled(blocks), 9, forget=True)[0] == steps


@pytest.mark.slow
def test_phases_of_another_state_or_without_graphs_change_nothing() -> None:
    made = compiled(blocks)
    model, backend, batch = made
    _, state, phases = phases_of(made, 4)
    sub = phases.model
    given = state["phases"]
    for wrong, message in (
        ({"selections": given["selections"][:1]}, "selections: expected"),
        ({"selections": [*given["selections"], None]}, "selections: expected"),
        ({"sub": {**given["sub"], "up.bias": torch.zeros(3)}}, r"state: of another model: (.|\n)*up\.bias"),
        ({"moments": {"other": {}}}, "state: of another model: it has moments of other"),
        ({"scheduler": {**given["scheduler"], "planned": {}}}, "state: of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            phases.load_state_dict({**given, **wrong})
        assert phases.model is sub and phases.last_step == 4
    graphs, before = backend._graphs, copy.deepcopy(model.state_dict())
    backend._graphs = []
    with pytest.raises(ValueError, match="the graphs that sub was cut out of are gone"):
        phases.finish()
    assert phases.model is sub and not record_of(sub).merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    backend._graphs = graphs
    assert phases.finish() is model
    new = Blocks().train()
    waiting = fx_approx.backend(HALF)
    new.compile(backend=waiting)
    with pytest.raises(ValueError, match="compiled no graph that samples yet; run a training step first"):
        Phases(waiting, torch.optim.SGD(new.parameters(), 1e-3), PlanRatios(), example_inputs=batch)


# ---- nothing happens to the model


def test_extracting_changes_nothing() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 1)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(F.relu(self.norm(self.up(x))), 0.5, self.training)).square().mean()

    for sampler in ("topk", "systematic"):
        policy = Override({"up": Exact()}, Uniform(0.5, sampler=sampler))
        runs = []
        for extracting in (False, True):
            model, backend, batch = compiled(lambda: (Net(), {"x": torch.randn(8, 16)}), policy)
            torch.manual_seed(1)
            if extracting:
                model.eval()
                sub = extract(backend, example_inputs=batch)
                assert not sub.training and not model.training and sub.up.out_features == 32
                model.train()
            losses = [loss_of(model, batch).item() for _ in range(3)]
            runs.append((losses, copy.deepcopy(model.state_dict())))
        assert runs[0][0] == runs[1][0]
        assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


# ---- what is refused


def test_what_cannot_be_cut_out_says_why() -> None:
    with pytest.raises(ValueError, match="has none yet; run a training step first"):
        extract(fx_approx.backend(HALF), example_inputs=torch.ones(1))
    _, backend, batch = compiled(blocks)
    with pytest.raises(ValueError, match="example_inputs: expected a batch"):
        extract(backend)
    with pytest.raises(ValueError, match="example_inputs: expected a batch"):
        Phases(backend, torch.optim.SGD(backend.models[0].parameters(), 1e-3), PlanRatios())
    _, backend, batch = compiled(blocks, Uniform(0.5, scores="online"))
    with pytest.raises(UnsupportedError, match="follows the activations"):
        extract(backend, example_inputs=batch)
    _, backend, batch = compiled(blocks, Exact())
    with pytest.raises(ValueError, match="nothing to cut out"):
        extract(backend, example_inputs=batch)


def test_tensors_that_are_read_in_two_ways_are_refused() -> None:
    class Decayed(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            loss = (x + self.down(F.gelu(self.up(x)))).square().mean()
            return loss + self.down.weight.square().sum()

    class Twice(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.down(F.gelu(self.up(x)))
            torch._dynamo.graph_break()
            return (x + self.up(x).mean()).square().mean()

    for kind in (Twice, Decayed):

        def build(kind: type[nn.Module] = kind) -> Made:
            return kind(), {"x": torch.randn(4, 5, 16)}

        _, backend, batch = compiled(build, Override({"down": HALF}, Exact()))
        with pytest.raises(UnsupportedError, match=r"gives other numbers on narrow layers|narrowed by one reader"):
            extract(backend, example_inputs=batch)


def test_python_that_names_sizes_in_no_attribute_does_not_serve() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)).reshape(4, 64)).square().mean()

    _, backend, batch = compiled(lambda: (Fixed(), {"x": torch.randn(4, 16)}), Override({"down": HALF}, Exact()))
    with pytest.raises(UnsupportedError, match=r"Fixed: its own Python does not run on narrow layers.*no graph of the"):
        extract(backend, example_inputs=batch)


def test_python_that_is_wrong_in_evaluation_is_refused() -> None:
    class Evaluating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.up(x))
            return self.down(hidden).square().mean() if self.training else self.down(hidden) + hidden.sum()

    _, backend, batch = compiled(lambda: (Evaluating(), {"x": torch.randn(4, 16)}), Override({"down": HALF}, Exact()))
    with pytest.raises(UnsupportedError, match=r"gives other numbers on narrow layers in evaluation; and a backend"):
        extract(backend, example_inputs=batch)
