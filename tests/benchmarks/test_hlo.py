"""Compiled programs are read right, from texts of a few lines."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

# As XLA writes one for a TPU: layouts with brackets of their own, comments in tuples,
# a convolution with two sums fused into it, a prefetch, a sum on its own.
TPU = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[4,8,8,16]{3,2,1,0})}

%sum.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%fused_convolution (p0: bf16[4,8,8,16], p1: bf16[3,3,16,16]) -> (f32[16], f32[16]) {
  %p0 = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %convolution.1 = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)} convolution(%p0, %p1), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %zero = f32[]{:T(128)} constant(0)
  %reduce.1 = f32[16]{0:T(128)} reduce(%convolution.1, %zero), dimensions={0,1,2}, \
to_apply=%sum.1
  ROOT %tuple.1 = (f32[16]{0:T(128)}, f32[16]{0:T(128)}, /*index=2*/bf16[4,8,8,16]{3,0\
,2,1:T(8,128)(2,1)}) tuple(%reduce.1, %reduce.1, %convolution.1)
}

%fused_sum (p0.1: bf16[4,8,8,16]) -> f32[16] {
  %p0.1 = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %zero.1 = f32[]{:T(128)} constant(0)
  ROOT %reduce.2 = f32[16]{0:T(128)} reduce(%p0.1, %zero.1), dimensions={0,1,2}, \
to_apply=%sum.1
}

ENTRY %main.2 (x.1: bf16[4,8,8,16], w.1: bf16[3,3,16,16]) -> (f32[16], f32[16]) {
  %x.1 = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)} parameter(0), sharding={replicated}, \
frontend_attributes={xla.sdy.sharding="#sdy.sharding<@mesh, [{}, {}, {}, {}]>"}
  %w.1 = bf16[3,3,16,16]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)S(1)}, bf16[4,8,8,16]{3,0,2,1:T(8,\
128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1), cross_program_prefetch_index=0
  %copy-done = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.1 = (f32[16]{0:T(128)S(1)}, f32[16]{0:T(128)S(1)}, bf16[4,8,8,16]{3,0,2,1:T(8\
,128)(2,1)}) fusion(%copy-done, %w.1), kind=kOutput, calls=%fused_convolution, \
metadata={op_name="jit(f)/jvp()/conv"}, backend_config={"window_config":{"kernel":["3"]\
,"estimated_cycles":"1000","is_mask":false},"used":[{"size":"3"}]}
  %get-tuple-element.1 = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)} \
get-tuple-element(%fusion.1), index=2
  %get-tuple-element.2 = f32[16]{0:T(128)S(1)} get-tuple-element(%fusion.1), index=0
  %fusion.2 = f32[16]{0:T(128)} fusion(%get-tuple-element.1), kind=kLoop, \
calls=%fused_sum, backend_config={"window_config":{"estimated_cycles":"234"}}
  ROOT %tuple.2 = (f32[16]{0:T(128)}, f32[16]{0:T(128)}) tuple(%get-tuple-element.2, \
%fusion.2)
}
"""
ARRAY, FILTERS, VECTOR = 2 * 4 * 8 * 8 * 16, 2 * 3 * 3 * 16 * 16, 4 * 16

# One row of an array; its sum over devices while another one runs; a library's call.
GPU = """\
HloModule jit_g, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%row (param_1: f32[8], param_0: bf16[100,8]) -> f32[1,8] {
  %param_0 = bf16[100,8]{1,0} parameter(1)
  %convert.1 = f32[100,8]{1,0} convert(%param_0)
  %slice.1 = f32[1,8]{1,0} slice(%convert.1), slice={[0:1], [0:8]}
  %param_1 = f32[8]{0} parameter(0)
  %broadcast.1 = f32[1,8]{1,0} broadcast(%param_1), dimensions={1}
  ROOT %subtract.1 = f32[1,8]{1,0} subtract(%slice.1, %broadcast.1)
}

ENTRY %main (x: bf16[100,8], v: f32[8], w: f32[8,8]) -> f32[100,8] {
  %x = bf16[100,8]{1,0} parameter(0)
  %v = f32[8]{0} parameter(1)
  %w = f32[8,8]{1,0} parameter(2)
  %fusion.1 = f32[1,8]{1,0} fusion(%v, %x), kind=kLoop, calls=%row
  %all-reduce-start = f32[1,8]{1,0} all-reduce-start(%fusion.1), channel_id=1, \
replica_groups={{0,1}}, to_apply=%add
  %cudnn-conv.1 = (f32[100,8]{1,0}, u8[16]{0}) custom-call(%x, %w), window={size=1x1}, \
custom_call_target="__cudnn$convForward", backend_config={"mode":"kNone","k":{"a":[]}}
  %all-reduce-done = f32[1,8]{1,0} all-reduce-done(%all-reduce-start)
  %all-gather.1 = (f32[2,8]{1,0}, pred[2,3]{1,0}) all-gather(%v, %v), dimensions={0}
  ROOT %get-tuple-element.1 = f32[100,8]{1,0} get-tuple-element(%cudnn-conv.1), index=0
}
"""


def entry(*operations):
    lines = "".join(f"  {operation}\n" for operation in operations)
    return f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{lines}}}\n"


def test_cycles_are_those_of_the_entry():
    assert hlo.cycles(hlo.parse(TPU)) == 1234
    assert hlo.cycles(hlo.parse(GPU)) is None


def test_traffic_is_operands_and_results_without_prefetches():
    # The fusion reads x and the filters, writes an array and two sums; a sum reads the
    # array again, although it is elementwise by its kind.
    convolution = ARRAY + FILTERS + ARRAY + 2 * VECTOR
    assert hlo.traffic(hlo.parse(TPU)) == convolution + ARRAY + VECTOR


def test_a_fusion_reads_the_rows_that_it_needs():
    module = hlo.parse(GPU)
    (fusion,) = (found for found in module.main if found.opcode == "fusion")
    assert hlo.needed(module, fusion) == [1.0, 0.01]
    row, call = 32 + 16 + 32, (1600 + 256) + (3200 + 16)
    sums, gathered = 32 + 32, 2 * 32 + (64 + 6)
    assert hlo.traffic(module) == row + call + sums + gathered


def test_fusions_that_read_an_array_of_the_inputs_size():
    module = hlo.parse(TPU)
    assert [found.name for found in hlo.readers(module, ARRAY)] == [
        "fusion.1",
        "fusion.2",
    ]
    assert hlo.readers(module, ARRAY + 1) == []


def test_sums_that_are_fused_into_a_convolution():
    module = hlo.parse(TPU)
    assert [found.name for found in hlo.fused_sums(module)] == ["fusion.1"]
    one = "(f32[16]{0}, bf16[4,8,8,16]{3,2,1,0})"
    for result, kind in (
        (one, "kOutput"),
        ("(f32[4]{0}, f32[4]{0}, bf16[4,8,8,16]{3,2,1,0})", "kOutput"),
        ("(f32[16]{0}, f32[16]{0}, bf16[4,8,8,16]{3,2,1,0})", "kLoop"),
        ("(f32[16]{0}, f32[16]{0})", "kOutput"),
    ):
        text = entry(f"ROOT %fusion = {result} fusion(), kind={kind}, calls=%f")
        assert hlo.fused_sums(hlo.parse(text)) == []


def test_collectives_are_counted_with_what_a_device_sends():
    # The part that is done later is no second one.
    assert hlo.collectives(hlo.parse(GPU)) == {"count": 2, "bytes": 32 + 2 * 32}
    assert hlo.collectives(hlo.parse(TPU)) == {"count": 0, "bytes": 0}


def test_figures_count_convolutions_wherever_they_are():
    found = hlo.figures(TPU, ARRAY)
    assert (found["convolutions"], found["library_calls"]) == (1, {})
    assert (found["fusions"], found["readers"], found["fused_sums"]) == (2, 2, 1)
    found = hlo.figures(GPU, 1600)
    assert found["library_calls"] == {"__cudnn$convForward": 1}
    assert (found["convolutions"], found["fusions"], found["readers"]) == (1, 1, 1)


def test_branches_move_nothing_and_are_told():
    text = entry(
        "%x = f32[8]{0} parameter(0)",
        "%tuple = (f32[8]{0}, (f32[8]{0}, pred[])) tuple(%x, %x)",
        "ROOT %conditional = (f32[8]{0}) conditional(%x, %tuple, %tuple), "
        "branch_computations={%region_1, %region_2}",
    )
    found = hlo.figures(text, 32)
    assert (found["control_flow"], found["traffic_bytes"]) == (1, 0)


def test_a_joined_prefetch_moves_nothing():
    text = entry(
        "%x = f32[8]{0} parameter(0)",
        "%slice-start = ((f32[8]{0}), f32[4]{0:S(1)}, s32[]) slice-start(%x), "
        "slice={[0:4]}",
        "%slice-done = f32[4]{0:S(1)} slice-done(%slice-start)",
        "ROOT %custom-call = f32[8]{0:S(1)} custom-call(%slice-done, %slice-done), "
        'custom_call_target="ConcatBitcast"',
    )
    found = hlo.figures(text, 32)
    assert (found["traffic_bytes"], found["library_calls"]) == (0, {})


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("f32[]", [("f32", (), 4)]),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", [("bf16", (2, 3), 12)]),
        ("(pred[5]{0}, ((c64[2]{0})))", [("pred", (5,), 5), ("c64", (2,), 16)]),
        ("f8e4m3fn[<=7]{0}", [("f8e4m3fn", (7,), 7)]),
        ("token[]", [("token", (), 0)]),
    ],
)
def test_types_of_results(result, expected):
    found = [(one.dtype, one.shape, one.bytes) for one in hlo.arrays(result)]
    assert found == expected


def test_a_text_that_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY in the text"):
        hlo.parse("module @jit_f { func.func public @main() }")
    with pytest.raises(ValueError, match="not an operation of HLO"):
        hlo.parse(entry("what is this"))


def test_a_program_of_this_xla():
    @jax.jit
    def f(x, w):
        y = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ w), x)
        return jnp.sum(y[:2]), jnp.sort(y, axis=0)

    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))
    found = hlo.figures(f.lower(x, w).compile().as_text(), x.nbytes)
    assert found["control_flow"] >= 1
    assert found["traffic_bytes"] > x.nbytes
