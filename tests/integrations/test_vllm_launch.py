"""When the plugin lets inductor's kernels launch dependently, in the config that vLLM makes."""

from __future__ import annotations

import pickle
import warnings
from types import SimpleNamespace

import pytest
import sympy
from helpers import DEMO_MODEL

from flute.integrations import vllm as plugin
from flute.launchers import EARLY_DEPENDENTS, early_dependents
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

pytest.importorskip("vllm")

from flute.integrations import inductor_norms, vllm_launch

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch") / "w4"
    quantize_checkpoint(DEMO_MODEL, folder, QuantizeOptions(4, 128, method="nf"))
    return folder


@pytest.fixture
def gpu(monkeypatch):
    """Make this one part of the plugin believe in a GPU; an H200 to begin with."""
    for name in (vllm_launch.ENVIRONMENT, EARLY_DEPENDENTS):
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv(vllm_launch.ENVIRONMENT, "1")

    def be(major, minor, is_cuda=True):
        platform = SimpleNamespace(
            is_cuda=lambda: is_cuda,
            get_device_capability=lambda: SimpleNamespace(major=major, minor=minor),
        )
        monkeypatch.setattr(vllm_launch, "current_platform", platform)

    be(9, 0)
    return be


def made(folder, **options):
    from vllm import EngineArgs

    plugin.register()
    return EngineArgs(model=str(folder), max_model_len=64, **options).create_engine_config()


def option(config, key=vllm_launch.OPTION):
    return config.compilation_config.inductor_compile_config.get(key)


def test_the_option_is_inductors():
    inductor = vllm_launch.inductor
    assert inductor.triton.enable_pdl is False
    with inductor.patch({vllm_launch.OPTION: True}):
        assert inductor.triton.enable_pdl is True


def test_an_h200_s_kernels_launch_dependently_and_nothing_else_changes(quantised, gpu, monkeypatch):
    on = made(quantised)
    assert option(on) is True
    assert not early_dependents()
    monkeypatch.delenv(EARLY_DEPENDENTS)
    monkeypatch.setenv(vllm_launch.ENVIRONMENT, "0")
    off = made(quantised)
    assert option(off) is None
    assert early_dependents()
    keys = (on.compilation_config.compute_hash(), off.compilation_config.compute_hash())
    assert keys[0] != keys[1]  # what was compiled with it is not taken for what was not
    for key in (vllm_launch.OPTION, vllm_launch.CHOICES):
        del on.compilation_config.inductor_compile_config[key]
    assert on.compilation_config == off.compilation_config
    assert on.compute_hash() == off.compute_hash()


@pytest.mark.parametrize(
    ("major", "minor", "is_cuda", "expected"),
    [(9, 0, True, True), (10, 0, True, True), (8, 9, True, None), (9, 4, False, None)],
    ids=["sm_90", "sm_100", "sm_89", "not NVIDIA's"],
)
def test_only_gpus_that_launch_dependently_are_told_to(
    quantised, gpu, major, minor, is_cuda, expected
):
    gpu(major, minor, is_cuda)
    assert option(made(quantised)) is expected


def test_a_torch_without_the_option_is_left_alone(quantised, gpu, monkeypatch):
    monkeypatch.setattr(vllm_launch, "inductor", SimpleNamespace(triton=SimpleNamespace()))
    assert option(made(quantised)) is None


def test_a_cpu_is_left_alone(quantised, monkeypatch):
    monkeypatch.setenv(vllm_launch.ENVIRONMENT, "1")
    assert option(made(quantised)) is None


@pytest.mark.parametrize(("asked", "expected"), [("", False), ("1", True), ("0", False)])
def test_what_the_user_says_of_the_option_stays(quantised, gpu, monkeypatch, asked, expected):
    """Neither value is replaced: the user's comes first, and the variable only adds it."""
    monkeypatch.setenv(vllm_launch.ENVIRONMENT, asked)
    for own in (False, True):
        said = {"inductor_compile_config": {vllm_launch.OPTION: own}}
        assert option(made(quantised, compilation_config=said)) is own
    assert (option(made(quantised)) is True) == expected


def test_norms_take_one_pass_with_dependent_launches(quantised, gpu, monkeypatch):
    on = made(quantised)
    assert option(on, vllm_launch.CHOICES) is inductor_norms.OnePassNorms
    assert "OnePassNorms" in str(on.compilation_config)  # vLLM prints it
    copy = pickle.loads(pickle.dumps(on.compilation_config))  # it gives it to its processes
    assert copy.inductor_compile_config == on.compilation_config.inductor_compile_config
    monkeypatch.setenv(vllm_launch.ENVIRONMENT, "0")
    assert option(made(quantised), vllm_launch.CHOICES) is None


def test_choices_of_the_user_stay_and_need_dependent_launches(quantised, gpu):
    """The user's option counts as much as the variable."""
    key = vllm_launch.CHOICES
    said = {"inductor_compile_config": {key: None}}
    config = made(quantised, compilation_config=said)
    assert (option(config), option(config, key)) == (True, None)
    said = {"inductor_compile_config": {vllm_launch.OPTION: False}}
    assert option(made(quantised, compilation_config=said), key) is None


def test_a_torch_without_the_hook_for_choices_launches_dependently_too(quantised, gpu, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(vllm_launch, "import_module", missing)
    config = made(quantised)
    assert (option(config), option(config, vllm_launch.CHOICES)) == (True, None)


@pytest.mark.parametrize(
    ("values", "hint", "cooperative", "expected"),
    [
        (512, "INNER", False, True),
        (4096, "INNER", False, True),
        (8192, "INNER", False, True),
        (8193, "INNER", False, False),
        (4096, "INNER", True, False),
        (4096, "OUTER", False, False),
        (64, "OUTER", False, True),
    ],
)
def test_rows_of_a_decoder_s_width_take_one_pass(values, hint, cooperative, expected):
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    features = SimpleNamespace(
        reduction_numel=sympy.Integer(values),
        numel=sympy.Integer(1024),
        get_reduction_hint=lambda: ReductionHint[hint],
    )
    sizes = SimpleNamespace(
        statically_known_leq=lambda left, right: bool(left <= right),
        optimization_hint=int,
    )
    with V.set_graph_handler(SimpleNamespace(sizevars=sizes)):
        choose = inductor_norms.OnePassNorms().should_use_persistent_reduction
        assert choose(features, cooperative) is expected
        with vllm_launch.inductor.patch({"triton.persistent_reductions": False}):
            assert choose(features, cooperative) is False


@pytest.mark.parametrize("other", [{"speculative_config": NGRAM}, {"enable_lora": True}])
def test_chains_that_were_not_looked_at_are_told_of(quantised, gpu, other):
    with pytest.warns(UserWarning, match="were not looked at"):
        assert option(made(quantised, **other)) is True


def test_other_architectures_are_told_of(gpu):
    def told(architectures):
        compilation = SimpleNamespace(inductor_compile_config={})
        config = SimpleNamespace(
            compilation_config=compilation, speculative_config=None, lora_config=None
        )
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            vllm_launch.launch_dependently(config, architectures)
        assert compilation.inductor_compile_config[vllm_launch.OPTION] is True
        return bool(seen)

    assert not told(["LlamaForCausalLM"])
    assert not told(["Qwen2ForCausalLM"])
    assert told(["Qwen3ForCausalLM"])
    assert told(["DeepseekV3ForCausalLM"])
    assert told(None)
    vllm_launch.launch_dependently(None, ["LlamaForCausalLM"])  # no VllmConfig was found
    vllm_launch.take_one_pass(None)


def test_nothing_is_switched_on_unasked(quantised, gpu, monkeypatch):
    monkeypatch.delenv(vllm_launch.ENVIRONMENT)
    config = made(quantised)
    assert (option(config), option(config, vllm_launch.CHOICES)) == (None, None)
    assert early_dependents()


def test_another_value_is_told_and_not_heeded(quantised, gpu, monkeypatch):
    monkeypatch.setenv(vllm_launch.ENVIRONMENT, "yes")
    with pytest.warns(
        UserWarning, match=r"FLUTE_VLLM_PDL=yes is not heeded; expected 0 \(off\) or"
    ):
        assert option(made(quantised)) is None
    monkeypatch.setenv(vllm_launch.ENVIRONMENT, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vllm_launch.launch_dependently(None, None)


def test_a_dense_model_quantised_while_it_loads_is_told_too(gpu, monkeypatch):
    monkeypatch.setenv("FLUTE_BITS", "4")
    assert option(made(DEMO_MODEL, quantization="flute")) is True
    assert option(made(DEMO_MODEL)) is None  # not ours
