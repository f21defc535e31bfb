"""maxlm.plan reads compiled programs: shapes, groups, trip counts, traffic and the walk, against answers by hand.

The texts in tests/hlo were compiled for real slices by tests/hlo/make.py; the schedules below are written by hand.
"""

from pathlib import Path

import numpy as np
import pytest

from maxlm.plan import buffers, hlo, work
from maxlm.plan.groups import permute_pairs, replica_groups
from maxlm.plan.hardware import CHIPS, DCN_HOP, HOP
from maxlm.plan.kernels import EFFICIENCY, kernel
from maxlm.plan.loops import trip_count
from maxlm.plan.network import Network
from maxlm.plan.schedule import KERNELS, LINKS, OTHERS, Air, Flight, Traffic, part_of, walk
from maxlm.plan.topology import parse

TEXTS = {path.stem: path.read_text() for path in (Path(__file__).parent / 'hlo').glob('*.txt')}
W = 2 * CHIPS['v5p'].link_rate  # of a ring


def network(name: str, mesh: dict[str, int]) -> Network:
  """Devices of one slice in the order of their coordinates, x slowest: mesh axes along x, y, z where their sizes match."""
  topology = parse(name)
  xyz = np.stack([at.reshape(-1) for at in np.indices(topology.extents)], axis=1)
  return Network(topology, mesh, np.concatenate([xyz, np.zeros((len(xyz), 2), int)], axis=1))


def cube() -> Network:
  return network('v5p:4x4x4', {'fsdp_x': 4, 'fsdp_y': 4, 'fsdp_z': 4})


# -- reading


@pytest.mark.parametrize('text, n_bytes, padded, space', [
  ('f32[]', 4, 4, 0), ('pred[3,5]{1,0:T(8,128)}', 15, 8 * 128, 0), ('bf16[2,8192]{1,0:T(2,128)(2,1)}', 32768, 32768, 0),
  ('bf16[10,100]{1,0:T(8,128)(2,1)S(1)}', 2000, 16 * 128 * 2, 1), ('f32[10,100]{0,1:T(8,128)}', 4000, 128 * 104 * 4, 0),
  ('s4[7]{0:T(1024)}', 4, 512, 0), ('f8e4m3fn[64]', 64, 64, 0), ('u32[2]{0:S(5)}', 8, 8, 5)])
def test_an_array_has_its_bytes_and_those_it_takes_in_tiles(text, n_bytes, padded, space):
  array, = hlo.arrays(text)
  assert (array.bytes, array.padded_bytes, array.space) == (n_bytes, padded, space)


@pytest.mark.parametrize('name', TEXTS)
def test_every_operand_and_computation_of_a_compiled_program_is_found(name):
  module = hlo.parse(TEXTS[name])
  assert module.scheduled
  for computation in module.computations.values():
    assert computation.root.is_root
    for i in computation:
      assert set(i.operands) <= set(computation.instructions) and set(i.called) <= set(module.computations), i.name


@pytest.mark.parametrize('text, message', [
  ('', 'no HLO text'), ('HloModule x\n\n%a (b: f32[]) -> f32[] {\n}\n', 'no ENTRY')])
def test_what_is_no_program_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    hlo.parse(text)


@pytest.mark.parametrize('text, groups', [
  ('{{0,1},{2,3}}', ((0, 1), (2, 3))), ('{}', ((0, 1, 2, 3),)), ('[2,2]<=[4]', ((0, 1), (2, 3))),
  ('[2,2]<=[2,2]T(1,0)', ((0, 2), (1, 3))), ('[1,4]<=[4]', ((0, 1, 2, 3),)),
  ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))), ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
  ("mesh['axis_0'=4] {'axis_0'}", ((0, 1, 2, 3),)), ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
  ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))), ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
  ("mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}", ((0, 2), (1, 3)))])
def test_replica_groups_in_every_syntax(text, groups):
  assert replica_groups(text, 4) == groups


def test_other_groups_are_refused_and_pairs_are_read():
  with pytest.raises(ValueError, match='does not know'):
    replica_groups('V2 groups', 4)
  assert permute_pairs('{{0,1},{1,0}}') == ((0, 1), (1, 0))


LOOP = '''HloModule loop, is_scheduled=true

%cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] LIMIT
  ROOT %c = pred[] compare(SIDES), direction=DIRECTION
}

%body (q: (s32[], s32[])) -> (s32[], s32[]) {
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  %step = s32[] constant(2)
  %next = s32[] add(%j, %step)
  ROOT %r = (s32[], s32[]) tuple(%next, %m)
}

ENTRY %main (a: s32[]) -> (s32[], s32[]) {
  %a = s32[] parameter(0)
  %start = s32[] constant(3)
  %end = s32[] constant(12)
  %copied = s32[] copy(%end)
  %t = (s32[], s32[]) tuple(%start, %copied)
  ROOT %w = (s32[], s32[]) while(%t), condition=%cond, body=%body
}
'''


@pytest.mark.parametrize('limit, sides, direction, trips', [
  ('constant(12)', '%i, %n', 'LT', 5), ('constant(13)', '%i, %n', 'LE', 6), ('constant(12)', '%n, %i', 'GT', 5),
  ('get-tuple-element(%p), index=1', '%i, %n', 'LT', 5), ('constant(3)', '%i, %n', 'LT', 0),
  ('parameter(1)', '%i, %n', 'LT', None)])
def test_trip_counts_are_read_from_conditions(limit, sides, direction, trips):
  module = hlo.parse(LOOP.replace('LIMIT', limit).replace('SIDES', sides).replace('DIRECTION', direction))
  assert trip_count(module, module.entry, module.entry.root) == trips


def test_flops_of_products_with_batch_dims_are_those_of_the_product():
  """The compiler writes a product over heads as a convolution whose window is mostly padding: 2048 x 4096 x 8 x 128."""
  text = '''HloModule m, is_scheduled=true

ENTRY %main (a: bf16[2048,4096,1], b: bf16[4096,8,128]) -> bf16[2048,8,128] {
  %a = bf16[2048,4096,1] parameter(0)
  %b = bf16[4096,8,128] parameter(1)
  ROOT %c = bf16[2048,8,128] convolution(%a, %b), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
}
'''
  module = hlo.parse(text)
  assert work.flops(module, module.entry, module.entry.root) == 2 * 2048 * 4096 * 8 * 128


# -- compiled programs


def test_a_scan_gathers_twice_and_scatters_along_one_axis_after_another():
  span, weight = walk(hlo.parse(TEXTS['scan_v5p']), cube()), 1024 * 1024 * 2
  got = {key: (t.count, t.received) for key, t in span.traffic.items()}
  assert got[('fsdp_x+fsdp_y+fsdp_z', 'all-gather')] == (12, 12 * weight * 63 / 64)
  scattered = {axis: (6, 6 * weight / parts * 3 / 4) for axis, parts in (('fsdp_x', 1), ('fsdp_y', 4), ('fsdp_z', 16))}
  assert {axis: got[(axis, 'reduce-scatter')] for axis in scattered} == scattered
  assert span.product_flops == 6 * 3 * 2 * 8 * 1024 * 1024 and not span.notes


def test_a_gather_uses_all_rings_of_a_torus_at_once():
  span, weight = walk(hlo.parse(TEXTS['scan_v5p']), cube()), 1024 * 1024 * 2
  gather = span.traffic[('fsdp_x+fsdp_y+fsdp_z', 'all-gather')]
  assert gather.seconds == pytest.approx(12 * (weight * 63 / 64 / (3 * W) + 3 * 2 * HOP))
  assert gather.exposed == pytest.approx(gather.seconds)  # this program gathers synchronously


def test_sparse_cores_hide_what_they_carry():
  span = walk(hlo.parse(TEXTS['scan_v6e_sparse_core']), network('v6e:16x16', {'fsdp_x': 256}))
  weight = 4096 * 4096 * 2
  scatter, gather = (span.traffic[('fsdp_x', kind)] for kind in ('reduce-scatter', 'all-gather'))
  assert (scatter.count, scatter.received) == (6, 6 * weight * 255 / 256)
  assert (gather.count, gather.received) == (12, 12 * weight * 255 / 256)
  assert gather.exposed < 0.3 * gather.seconds and scatter.exposed < 0.3 * scatter.seconds


def test_fused_gathers_go_on_while_the_products_that_carry_them_run():
  span = walk(hlo.parse(TEXTS['scan_v5e_fused']), network('v5e:16x16', {'fsdp_x': 16, 'fsdp_y': 16}))
  gather = span.traffic[('fsdp_x+fsdp_y', 'all-gather')]
  assert gather.count == 12 and 0 < gather.exposed < gather.seconds


def test_a_product_is_not_charged_with_the_buffers_of_the_gather_that_it_carries():
  """512 x 512 x 512 in a fusion that passes on, and goes on filling, the 64 MiB of a gather."""
  part, whole, square, state = 'bf16[256,8192]{1,0}', 'bf16[4096,8192]{1,0}', 'bf16[512,512]{1,0}', 'u32[]{:S(2)}'
  signature = f'(p: {part}, q: {whole}, s: {state}, x: {square}, y: {square})'
  parameters = '\n'.join(f'  %{name} = {shape} parameter({i})'
                         for i, (name, shape) in enumerate(zip('pqsxy', (part, whole, state, square, square))))
  results = f'({square}, {part}, {whole}, {whole}, {state})'
  module = hlo.parse(f'''HloModule m, is_scheduled=true

%carrier {signature} -> {results} {{
{parameters}
  %c = {square} convolution(%x, %y), dim_labels=bf_io->bf
  %ag = {whole} all-gather(%p), replica_groups=mesh['fsdp_x'=16] {{'fsdp_x'}}, dimensions={{0}}
  ROOT %t = {results} tuple(%c, %p, %q, %ag, %s)
}}

ENTRY %main {signature} -> {square} {{
{parameters}
  %f = {results} fusion(%p, %q, %s, %x, %y), kind=kOutput, calls=%carrier
  ROOT %r = {square} get-tuple-element(%f), index=0
}}
''')
  assert work.hbm_bytes(module, module.entry, module.entry.instructions['f']) == 3 * 512 * 512 * 2


def test_permutes_and_all_to_alls_are_along_their_axis():
  span = walk(hlo.parse(TEXTS['permute_v5e']), network('v5e:2x2', {'tensor': 4}))
  assert [(key, t.count, t.received) for key, t in span.traffic.items()] == [
    (('tensor', 'collective-permute'), 1, 256 * 256 * 2)]
  span = walk(hlo.parse(TEXTS['all_to_all_v5e']), network('v5e:4x4', {'fsdp_x': 4, 'expert': 4}))
  assert [(key, t.count, t.received) for key, t in span.traffic.items()] == [
    (('expert', 'all-to-all'), 1, 16 * 256 * 2 * 3 / 4)]


def test_kernels_are_found_and_cost_what_their_tiles_do():
  span = walk(hlo.parse(TEXTS['attention_v5p']), network('v5p:2x2x1', {'fsdp_x': 2, 'fsdp_y': 2}))
  assert {name: int(count) for name, (count, *_) in span.calls.items()} == {'splash_mha_fwd': 1, 'splash_mha_dq': 1}
  assert span.sources[KERNELS] > 0 and span.calls['splash_mha_fwd'][2] > 0


@pytest.mark.parametrize('name', TEXTS)
def test_what_is_alive_at_the_peak_has_the_peaks_bytes(name):
  most, alive = buffers.peak(hlo.parse(TEXTS[name]))
  assert most == sum(buffer.bytes for buffer in alive) > 0


BF16 = lambda *dims: hlo.Array('bf16', dims)


@pytest.mark.parametrize('kind, products, tables, T, S, tiles', [
  ('fwd', 2, (1, 4, 4), 512, 512, 1 + 2 + 3 + 4), ('dq', 3, (1, 4, 4), 512, 512, 10), ('dkv', 4, (1, 4, 4), 512, 512, 10),
  ('fwd', 2, (1, 4, 2), 512, 512, 1 + 2 + 2 + 2), ('dkv', 4, (1, 2, 4), 512, 512, 2 + 2 + 2 + 1),  # a window of two tiles
  ('fwd', 2, (1, 2, 3), 256, 512, 6),  # some of the queries, a window of keys
  ('fwd', 2, (1, 2, 8), 256, 1024, 9)])  # some of the queries, in zigzag order: half of the keys and the diagonal
def test_attention_costs_the_tiles_that_it_visits(kind, products, tables, T, S, tiles):
  notes = ' '.join(f'\\"block_{x}{suffix}\\": 128,' for x in ('q', 'kv') for suffix in ('', '_dq', '_dkv'))
  inputs = [hlo.Array('s16', tables), BF16(2, 8, T, 64), BF16(2, 2, S, 64), BF16(2, 2, S, 64)]
  found = kernel(f'splash_mha_{kind}', inputs, [BF16(2, 8, T, 64)], notes, CHIPS['v6e'])
  assert found.flops == 2 * 8 * tiles * 2 * 128 * 128 * 64 * products
  assert found.seconds >= found.flops / (CHIPS['v6e'].flops * EFFICIENCY['attention'] * 64 / 256)
  inputs[1] = BF16(2, 8, 64, T)  # queries with time in the lanes
  turned = kernel(f'splash_mha_{kind}', inputs, [BF16(2, 8, T, 64)], notes + '\\"q_layout\\": 2,', CHIPS['v6e'])
  assert turned.flops == found.flops
  if kind == 'dkv':  # all gradients at once
    outputs = [BF16(4, 2, 8, T, 64), BF16(2, 2, S, 64), BF16(2, 2, S, 64)]
    assert kernel('splash_mha_dkv', inputs, outputs, notes + '\\"q_layout\\": 2,', CHIPS['v6e']).flops == found.flops * 5 / 4


@pytest.mark.parametrize('inputs, output', [
  ([BF16(4096, 512), BF16(8, 512, 256)], BF16(4096, 256)), ([BF16(4096, 256), BF16(8, 512, 256)], BF16(4096, 512)),
  ([BF16(4096, 512), BF16(4096, 256)], BF16(8, 512, 256)), ([BF16(512, 4096), BF16(4096, 256)], BF16(8, 512, 256))])
def test_grouped_products_cost_the_rows_that_have_tokens(inputs, output):
  whole, part = (kernel('grouped_rows', inputs, [output], '', CHIPS['v5p'], filled) for filled in (1.0, 0.25))
  assert whole.flops == 2 * 4096 * 512 * 256 and part.flops == whole.flops / 4 and part.seconds < whole.seconds
  assert not kernel('mystery', inputs, [output], '', CHIPS['v5p']).known


# -- walks by hand


def schedule(body: str) -> str:
  return f'''HloModule hand, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}}

%one (p: f32[]) -> f32[] {{
  %p = f32[] parameter(0)
  ROOT %n = f32[] negate(%p)
}}

ENTRY %main (a: f32[], g: bf16[64,1048576]) -> f32[] {{
  %a = f32[] parameter(0)
  %g = bf16[64,1048576]{{1,0}} parameter(1)
{body}
}}
'''


def compute(name: str, milliseconds: float) -> str:
  cycles = int(milliseconds * 1e-3 * CHIPS['v5p'].clock)
  return (f'  %{name} = f32[] fusion(%a), kind=kLoop, calls=%one, '
          f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}')


def gather(name: str, opcode: str, axis: str = 'fsdp_x') -> str:
  groups = f"mesh['fsdp_x'=4,'fsdp_y'=4,'fsdp_z'=4] {{'{axis}'}}"
  shape = 'bf16[256,1048576]{1,0}'
  shape = f'(bf16[64,1048576]{{1,0}}, {shape})' if opcode.endswith('start') else shape
  return f'  %{name} = {shape} {opcode}(%g), replica_groups={groups}, dimensions={{0}}'


def done(name: str, of: str) -> str:
  return f'  %{name} = bf16[256,1048576]{{1,0}} all-gather-done(%{of})'


ONE = 256 * 1048576 * 2 * 3 / 4 / W + 2 * HOP  # seconds of one gather over a ring of four: 2.24 ms


def walked(*lines: str):
  return walk(hlo.parse(schedule('\n'.join([*lines[:-1], lines[-1].replace('  %', '  ROOT %', 1)]))), cube())


def test_a_synchronous_gather_is_exposed():
  span = walked(compute('c', 1.0), gather('ag', 'all-gather'), compute('d', 2.0))
  assert span.seconds == pytest.approx(3e-3 + ONE, rel=1e-6) and span.serial == pytest.approx(span.seconds)
  assert span.sources[LINKS] == pytest.approx(ONE) and span.sources[OTHERS] == pytest.approx(3e-3, rel=1e-6)


def test_an_asynchronous_gather_hides_behind_what_is_scheduled_before_its_done():
  span = walked(gather('s', 'all-gather-start'), compute('c', 1.0), done('ag', 's'), compute('d', 1.0))
  assert span.seconds == pytest.approx(ONE + 1e-3, rel=1e-6)
  assert span.traffic[('fsdp_x', 'all-gather')].exposed == pytest.approx(ONE - 1e-3, rel=1e-5)
  span = walked(gather('s', 'all-gather-start'), compute('c', 5.0), done('ag', 's'), compute('d', 1.0))
  assert span.seconds == pytest.approx(6e-3, rel=1e-6) and span.sources[LINKS] == 0
  assert span.serial == pytest.approx(6e-3 + ONE, rel=1e-6)


def test_gathers_along_one_axis_share_its_wires_and_along_two_do_not():
  lines = lambda axis: (gather('s', 'all-gather-start'), gather('t', 'all-gather-start', axis), done('ag', 's'),
                        done('bg', 't'), compute('c', 1.0))
  assert walked(*lines('fsdp_x')).seconds == pytest.approx(2 * ONE + 1e-3, rel=1e-6)
  assert walked(*lines('fsdp_y')).seconds == pytest.approx(ONE + 1e-3, rel=1e-6)


def test_a_loops_time_and_traffic_are_its_rounds():
  text = LOOP.replace('LIMIT', 'constant(12)').replace('SIDES', '%i, %n').replace('DIRECTION', 'LT')
  work_of_a_round = compute('c', 1.0).replace('(%a)', '(%e)').replace('%one', '%neg')
  text = text.replace('  %next', f'  %e = f32[] constant(1)\n{work_of_a_round}\n  %next').replace(
    '%cond (p', '%neg (z: f32[]) -> f32[] {\n  %z = f32[] parameter(0)\n  ROOT %n = f32[] negate(%z)\n}\n\n%cond (p', 1)
  span = walk(hlo.parse(text), cube())
  assert span.sources[OTHERS] == pytest.approx(5e-3, rel=1e-6)
  bar, = [bar for bar in span.bars if bar.lane == 'loop']
  assert (bar.trips, bar.seconds) == (5, pytest.approx(span.seconds, rel=1e-3))


def test_a_sentinel_for_unknown_cycles_is_not_taken_for_a_number():
  span = walked(compute('c', 1.0).replace('"estimated_cycles":"1750000"', f'"estimated_cycles":"{2**63 - 1}"'))
  assert span.seconds < 1e-6


def test_an_unscheduled_program_is_refused():
  with pytest.raises(ValueError, match='not scheduled'):
    walk(hlo.parse(schedule(compute('c', 1.0)).replace(', is_scheduled=true', '')), cube())


# -- wires


def test_a_line_takes_twice_as_long_as_a_ring_and_an_all_reduce_twice_as_long_as_a_gather():
  line = network('v5e:4x4', {'a': 4, 'b': 4})
  ring = network('v5e:16x16', {'a': 16, 'b': 16})
  n, link = 1 << 30, CHIPS['v5e'].link_rate
  seconds = lambda net, kind, group: net.gather(kind, group, n, None).seconds
  assert seconds(line, 'all-gather', (0, 1, 2, 3)) == pytest.approx(n * 3 / 4 / link + 3 * HOP)
  assert seconds(ring, 'all-gather', tuple(range(16))) == pytest.approx(n * 15 / 16 / (2 * link) + 8 * HOP)
  assert seconds(ring, 'all-reduce', tuple(range(16))) == pytest.approx(2 * seconds(ring, 'all-gather', tuple(range(16))))
  assert seconds(ring, 'all-to-all', tuple(range(16))) == pytest.approx(n * 16 / (4 * 2 * link) + 8 * HOP)


def test_groups_are_named_by_the_axes_they_extend_along():
  net = cube()
  assert net.axes((0, 1, 2, 3)) == 'fsdp_z' and net.axes((0, 16, 32, 48)) == 'fsdp_x'
  assert net.axes(tuple(range(16))) == 'fsdp_y+fsdp_z' and net.axes((0, 1)) == 'fsdp_z (part)'


def test_several_slices_talk_over_the_data_centre_network():
  topology = parse('v5p:2x2x1', 2)
  xyz = np.stack([at.reshape(-1) for at in np.indices(topology.extents)], axis=1)
  places = np.concatenate([np.column_stack([xyz, np.zeros(4, int), np.full(4, s)]) for s in (0, 1)])
  net = Network(topology, {'data': 2, 'fsdp_x': 4}, places)
  route = net.gather('all-reduce', (0, 4), 1 << 30, None)
  assert route.axes == 'data' and route.wires == ('dcn',)
  assert route.seconds == pytest.approx((1 << 30) / CHIPS['v5p'].dcn_rate, rel=1e-3)  # 2 x half of it


def test_what_crosses_slices_is_under_way_from_its_send_to_its_recv_done():
  """As the compiler writes it for two slices: the runtime carries the data, the program sends and receives."""
  notes = ('is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r_0",'
           '_xla_megascale_transfer_type="ALL_REDUCE"}')
  lines = ['  %tok = token[] after-all()',
           f'  %s = (bf16[64,1048576]{{1,0}}, u32[], token[]) send(%g, %tok), channel_id=1, {notes}',
           f'  %r = (bf16[64,1048576]{{1,0}}, u32[], token[]) recv(%tok), channel_id=2, {notes}',
           compute('c', 1.0), '  %sd = token[] send-done(%s), channel_id=1, is_host_transfer=true',
           '  %rd = (bf16[64,1048576]{1,0}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true',
           '  ROOT %d = f32[] negate(%c)']
  topology = parse('v5p:2x2x1', 2)
  places = np.array([[x, y, 0, 0, s] for s in (0, 1) for x in (0, 1) for y in (0, 1)])
  span = walk(hlo.parse(schedule('\n'.join(lines))), Network(topology, {'data': 2, 'fsdp_x': 4}, places))
  (key, traffic), = span.traffic.items()
  assert key == ('data', 'all-reduce') and traffic.received == 64 * 1048576 * 2
  assert traffic.seconds == pytest.approx(traffic.received / CHIPS['v5p'].dcn_rate + DCN_HOP)
  assert traffic.exposed == pytest.approx(traffic.seconds - 1e-3, rel=1e-6) and not span.notes


def test_traffic_adds_up():
  total = Traffic()
  total.add(Traffic(1, 10.0, 2.0, 0.5), 3)
  assert total == Traffic(3, 30.0, 6.0, 1.5)


@pytest.mark.parametrize('op_name, part', [
  ('jit(train_step)/transpose(jvp())/while/body/eval_jaxpr/checkpoint/mlp/BTF,FD->BTD/dot_general', 'mlp, backward'),
  ('jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mixer/mul', 'mixer, recomputed'),
  ('jit(train_step)/jvp()/while/body/eval_jaxpr/mixer/reduce_sum', 'mixer'), ('', 'other'), ('broadcast.3', 'other'),
  ('jit(train_step)/cond/branch_1_fun/optimizer/add', 'optimizer'),
  ('jit(train_step)/transpose(jvp(head))/shard_map/CD,CV->DV/dot_general', 'head, backward')])
def test_instructions_belong_to_parts_of_the_model(op_name, part):
  assert part_of(op_name) == part


def test_what_is_in_flight_lands_however_late_in_the_step():
  """A clock at 23.7 s does not move by 1e-15."""
  air = Air()
  air.now = 23.706378266612894
  flight = Flight('gather', 'mlp', air.now, 1.1335198188064388e-15, ('x+',), None)
  air.flights.append(flight)
  air.advance(air.now + flight.left)
  assert flight.ended == air.now
