"""What a configuration says is what the model has: presets, slots of each layer, size of the memory."""

import copy

import pytest
import torch
from model_cases import SIZES, SLOTS, STUDENTS, same, student_model, tokens
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
)

from t2r.errors import UserError
from t2r.modeling.cache import CACHE, SlotCacheLayer
from t2r.modeling.configuration import CONFIG_CLASSES, GSAConfig, fit_layers, preset


def test_presets_refuse_what_cannot_be():
    for options in ({"slots": 0}, {"slots": 4, "sinks": 4}, {"sinks": -1}, {"eviction": "newest"}):
        with pytest.raises(UserError):
            preset("exact", **options)
    for options in ({"sinks": 4}, {"eviction": "score"}):
        with pytest.raises(UserError, match="no clock"):
            preset("paper", **options)
    with pytest.raises(UserError, match="nearest valid: exact"):
        preset("exat")
    config = CONFIG_CLASSES["llama"](**SIZES, gsa={"slotz": 4})
    with pytest.raises(UserError, match="unknown GSA setting 'slotz'.*nearest valid: slots"):
        AutoModelForCausalLM.from_config(config)
    for record in ({"layers": {"2": {}}}, {"softmax_layers": [-1]}):
        with pytest.raises(UserError, match="there is no layer"):
            AutoModelForCausalLM.from_config(CONFIG_CLASSES["llama"](**SIZES, gsa=record))


def test_slots_fit_each_layer():
    """fit_layers: a ring as large as a layer's window needs no sinks; near sinks stay within what a layer has seen."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=4, layer_types=kinds, sliding_window=512, max_position_embeddings=8192
    )  # fmt: skip
    gsa = fit_layers(preset("exact", slots=64, eviction="score"), config, {1: 1000, 2: 100}, [3])
    full, sliding, more = (gsa.layer(i) for i in range(3))
    assert (full.slots, full.ring, full.sinks, full.sink_distance) == (64, 64, 4, 1024)
    assert (sliding.slots, sliding.ring, sliding.sinks, sliding.sink_distance) == (512, 512, 0, None)
    assert (more.slots, more.ring, more.sinks, more.sink_distance) == (100, 100, 4, 1024)
    assert full.scored and more.scored and not sliding.scored  # which loses nothing
    assert gsa.layer(3) is None and GSAConfig(**gsa.to_dict()) == gsa
    assert fit_layers(preset("exact"), config, {}, []).layer(1).sink_distance == 64
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    phi = Phi3Config(rope_parameters=longrope, max_position_embeddings=131072, original_max_position_embeddings=4096)
    assert fit_layers(preset("exact"), phi, {}, []).sink_distance == 4096 // 8
    assert fit_layers(preset("paper"), config, {1: 32}, []).layer(1).slots == 32
    with pytest.raises(UserError, match="layer 3 keeps softmax"):
        fit_layers(preset("exact"), config, {3: 8}, [3])
    with pytest.raises(UserError, match="4 slots are too few in layer 0"):
        fit_layers(preset("exact"), config, {0: 4}, [])
    with pytest.raises(UserError, match="every layer would keep softmax"):
        fit_layers(preset("exact"), config, {}, [0, 1, 2, 3])


@torch.no_grad()
def test_a_ring_of_the_window_is_the_window():
    """With as many slots as the window of a sliding layer nothing is lost, however long the text."""
    torch.manual_seed(0)
    sizes = SIZES | {"sliding_window": 24, "max_position_embeddings": 4096}
    teacher = MistralForCausalLM(MistralConfig(**sizes)).eval()
    gsa = fit_layers(preset("exact", slots=64), teacher.config, {}, [])
    student = AutoModelForCausalLM.from_config(CONFIG_CLASSES["mistral"](**sizes, gsa=gsa.to_dict())).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    ids = tokens(1, 400)
    same(student(ids).logits, teacher(ids).logits)
    assert student.model.gsa_layers[0].slots == 24


def test_scores_that_are_not_fitted_evict_the_oldest():
    """Then the model is that without them; others are another model, and have no gradients."""
    model, without = student_model(eviction="score", trained=False), student_model(trained=False)
    ids = tokens(2, 70)
    same(model(ids).logits, without(ids).logits)
    layer = model.model.layers[1].self_attn
    with torch.no_grad():
        layer.bonus.weight.normal_(std=10)
    out = model(ids, labels=ids)
    assert (out.logits[:, SLOTS:] - without(ids).logits[:, SLOTS:]).abs().max() > 1e-3
    out.loss.backward()
    assert layer.bonus.weight.grad is None and layer.recent.grad is None and layer.f_proj.weight.grad is not None


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_state_size_is_constant_and_forks(name):
    model, cache, sizes = student_model(name), DynamicCache(), []
    for _ in range(3):
        model(tokens(1, 50), **{CACHE: cache})
        sizes.append(sum(layer.nbytes for layer in cache.layers if isinstance(layer, SlotCacheLayer)))
    slots = [gsa.slots for gsa in model.model.gsa_layers.values()]
    assert sizes == [sum(4 * 2 * m * (16 + 16 + 1 + 2 * (name == "hybrid")) + 8 for m in slots)] * 3
    assert sizes[0] == GSAConfig.of(model.config).state_bytes(model.config)
    fork = copy.deepcopy(cache)
    a, b = tokens(1, 20, seed=1), tokens(1, 20, seed=2)
    want = model(b, **{CACHE: copy.deepcopy(cache)}).logits
    model(a, **{CACHE: fork})
    same(model(b, **{CACHE: cache}).logits, want, atol=0)
    if len(slots) == 2:  # keys and values are emptied by newer versions of transformers only
        cache.reset()
        same(model(b, **{CACHE: cache}).logits, model(b).logits)
