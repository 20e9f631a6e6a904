"""Other selections come into the tensors of a subnetwork, as a fresh subnetwork would have them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import fx_approx
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.sampling import Selection
from fx_approx.subnetworks import extract, load, merge, record_of, reselect, save
from fx_approx.subnetworks.record import tensors_of
from fx_approx.subnetworks.source import source_of
from tests.helpers.demand_nets import NETS
from tests.helpers.quick import in_turn, thinned
from tests.subnetworks.nets import TWICE, X, hidden, other_selections, same, transformed

RANDOM = Override({"0": Exact()}, Uniform(0.5, scores="uniform", sampler="systematic"))


@pytest.mark.parametrize(("name", "scope"), in_turn(NETS, ["value", "group"], step=2))
def test_the_tensors_are_those_of_a_fresh_subnetwork(name: str, scope: str) -> None:
    for sampler in ("topk", "systematic"):
        approx, x = transformed(name, scope, sampler)
        sub = extract(approx)
        tensors, before = {id(tensor) for tensor in tensors_of(sub).values()}, copy.deepcopy(sub)
        merge(sub, approx)
        with torch.no_grad():
            for parameter in approx.parameters():
                parameter.add_(torch.randn_like(parameter))
        chosen = other_selections(sub, approx, sampler == "systematic")
        assert reselect(sub, approx, chosen) == tuple(chosen)
        fresh = extract(approx, chosen)
        assert same(sub, fresh) and not same(sub, before)
        assert {id(tensor) for tensor in tensors_of(sub).values()} == tensors
        assert record_of(sub).cuts.keys() == record_of(fresh).cuts.keys()
        before_merge = copy.deepcopy(approx.state_dict())
        merge(sub, approx)  # to the new places, where the weights came from
        for key, value in approx.state_dict().items():
            assert torch.allclose(value, before_merge[key], rtol=1e-12, atol=0), key
        assert torch.equal(sub(x), fresh(x))


@pytest.mark.parametrize("name", thinned([*NETS][::-1]))
def test_the_users_own_class_takes_other_selections_too(name: str) -> None:
    approx, x = transformed(name)
    sub = extract(approx, example_inputs=x)
    merge(sub, approx)
    chosen = other_selections(sub, approx, False)
    reselect(sub, approx, chosen)
    fresh = extract(approx, chosen, example_inputs=x)
    assert record_of(sub).forms == record_of(fresh).forms and same(sub, fresh)
    assert torch.equal(sub(x), fresh(x))


def test_a_layer_that_serves_two_readers_needs_one_selection_ever_after() -> None:
    approx, _ = transformed(TWICE)
    shared = list(find(approx)._fx_approx.resample.each())
    equal = [Selection(torch.arange(one.pairs // 2).view(1, -1), None) for one in shared]
    sub = extract(approx, equal)
    merge(sub, approx)
    differing = [Selection(one.indices + place % 2, None) for place, one in enumerate(equal)]
    with pytest.raises(fx_approx.errors.UnsupportedError, match="several selections"):
        reselect(sub, approx, differing)
    assert not source_of(approx, None).anew(sub, tuple(differing), None), "a phase makes another one"
    assert record_of(sub).merged
    reselect(sub, approx, [Selection(one.indices + 1, None) for one in equal])


def test_random_selections_go_on_with_each_call_and_stay_under_reuse_selection() -> None:
    approx = hidden(RANDOM, seed=3)
    sub = extract(approx)
    seen = [record_of(sub).selections]
    for _ in range(3):
        merge(sub, approx)
        seen.append(reselect(sub, approx))
    drawn = [tuple(one.indices.flatten().tolist()) for chosen in seen for one in chosen[:1] if one is not None]
    assert len(set(drawn)) == 4
    with fx_approx.reuse_selection(approx):
        merge(sub, approx)
        first = reselect(sub, approx)
        merge(sub, approx)
        assert torch.equal(first[0].indices, reselect(sub, approx)[0].indices)


def test_a_kept_selection_is_used_up_by_a_subnetwork() -> None:
    approx = hidden(RANDOM, selection_interval=10)
    approx(X).sum().backward()
    sub = extract(approx)
    first = record_of(sub).selections[0].indices
    merge(sub, approx)
    assert not torch.equal(first, reselect(sub, approx)[0].indices)
    assert fx_approx.sampler_state_dict(approx)["step"] == 10


@pytest.mark.parametrize(("name", "example"), in_turn(["grouped", "post-activation"], [True, False]))
def test_a_stored_subnetwork_goes_on(name: str, example: bool) -> None:
    approx, x = transformed(name)
    sub = extract(approx, example_inputs=x if example else None)
    file = io.BytesIO()
    save(sub, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(sub)), load(file, approx, example_inputs=x)]
    for one in (sub, *copies):
        merge(one, approx)
        reselect(one, approx)
    assert all(same(sub, one) for one in copies)


def wrong(error: type[Exception], message: str, *args: Any) -> None:
    sub = args[0]
    before = {name: tensor.clone() for name, tensor in tensors_of(sub).items()}
    cuts, versions = record_of(sub).cuts, dict(record_of(sub).versions)
    with pytest.raises(error, match=message):
        reselect(*args)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(sub).items())
    assert record_of(sub).cuts is cuts and record_of(sub).versions == versions


def test_what_does_not_fit_is_refused_and_leaves_all_as_it_was() -> None:
    approx, (other, _) = hidden(), transformed("gated")
    sub = extract(approx)
    wrong(ValueError, r"call fx_approx.subnetworks.merge\(sub, model\) first", sub, approx)
    merge(sub, approx)
    wrong(ValueError, "cut out of another model", sub, other)
    wrong(ValueError, "expected 2, one for each", sub, approx, record_of(extract(other)).selections)
    narrower = [Selection(one.indices[:, 1:], None) for one in record_of(sub).selections]
    wrong(
        ValueError,
        r"selections\[0\]: expected 32 units in each of 1 groups, as sub has it, got 31",
        sub,
        approx,
        narrower,
    )
    wrong(ValueError, "got all units: another ratio needs another subnetwork", sub, approx, [None, None])
    twice = [Selection(torch.zeros(1, 32, dtype=torch.int64), None)] * 2
    wrong(ValueError, "units once each", sub, approx, twice)
    fx_approx.set_sampling(approx, 0.25)
    wrong(ValueError, "got 16 units in each of 1 groups: another ratio needs another subnetwork", sub, approx)
