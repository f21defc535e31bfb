"""Which instructions are collectives, in all the guises the compiler gives them, and what they move."""

import dataclasses
import re

from maxlm.plan.groups import permute_pairs, replica_groups
from maxlm.plan.hlo import Instruction, Module
from maxlm.plan.network import Network, Route

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
         'collective-broadcast')


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
  """kind: one of KINDS. bytes: of the whole array (of a device's input for all-to-all). op_name: where it was made."""

  kind: str
  bytes: int
  route: Route
  op_name: str


def collective_of(module: Module, instruction: Instruction, network: Network) -> Collective | None:
  """The collective that an instruction is, starts, or has inside; None for others and for those that only finish one."""
  opcode = instruction.opcode
  if opcode.removesuffix('-start') in KINDS:
    return _collective(instruction, opcode.removesuffix('-start'), network)
  if opcode in ('async-start', 'call-start', 'call-update') or opcode == 'fusion':
    if opcode == 'fusion' and not is_collective_fusion(module, instruction):
      return None
    inner = [i for i in module.inside(instruction) if i.opcode.removesuffix('-start') in KINDS]
    if inner:
      kind = inner[0].opcode.removesuffix('-start')
      if kind == 'all-reduce' and any(i.opcode == 'dynamic-slice' and i.is_root for i in module.inside(instruction)):
        kind = 'reduce-scatter'  # 'all-reduce-scatter': an emitter that keeps only its part of the sum
      return _collective(inner[0], kind, network)
  return None


def crossing_of(send: Instruction, network: Network) -> Collective | None:
  """The part of a collective that goes from slice to slice: the runtime carries what one device hands it to its peers."""
  notes = send.attributes.get('frontend_attributes', '')
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', notes)
  if found is None:
    return None
  kind = found[1].lower().replace('_', '-')
  n_bytes = send.shape[0].bytes
  return Collective(kind, n_bytes, network.between_slices(kind, n_bytes), send.op_name)


def rendezvous(instruction: Instruction) -> str:
  """What the `send` and the `recv` of one transfer have in common."""
  found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes.get('frontend_attributes', ''))
  return found[1] if found else ''


def is_collective_fusion(module: Module, fusion: Instruction) -> bool:
  """Whether a fusion starts or is a collective, rather than going on with one or finishing it beside other work."""
  if fusion.attributes.get('kind') != 'kCustom':
    return False
  targets = {i.attributes.get('custom_call_target') for i in module.inside(fusion)}
  return '"AsyncCollectiveDone"' not in targets


def is_done_fusion(module: Module, instruction: Instruction) -> bool:
  return instruction.opcode == 'fusion' and instruction.attributes.get('kind') == 'kCustom' and any(
    i.attributes.get('custom_call_target') == '"AsyncCollectiveDone"' for i in module.inside(instruction))


def is_start_fusion(module: Module, instruction: Instruction) -> bool:
  return instruction.opcode == 'fusion' and instruction.attributes.get('kind') == 'kCustom' and any(
    i.attributes.get('custom_call_target') == '"AsyncCollectiveStart"' for i in module.inside(instruction))


def _collective(instruction: Instruction, kind: str, network: Network) -> Collective:
  n_devices = len(network.places)
  if kind in ('collective-permute', 'collective-broadcast'):
    pairs = permute_pairs(instruction.attributes.get('source_target_pairs', ''))
    n_bytes = _output_bytes(instruction)
    return Collective(kind, n_bytes, network.permute(pairs, n_bytes), instruction.op_name)
  group = replica_groups(instruction.attributes.get('replica_groups', '{}'), n_devices)[0]
  n_bytes = _output_bytes(instruction)
  if kind == 'reduce-scatter' and instruction.opcode.startswith('reduce-scatter'):
    n_bytes *= len(group)
  route = network.gather(kind, group, n_bytes, _dims_used(instruction))
  return Collective(kind, n_bytes, route, instruction.op_name)


def _output_bytes(instruction: Instruction) -> int:
  """Of the result; what starts a collective has its operands and semaphores in the tuple too."""
  arrays = [a for a in instruction.shape if not (a.dtype in ('u32', 's32') and a.space > 1)]
  if instruction.opcode in ('all-gather-start', 'collective-permute-start') and len(arrays) > 1:
    arrays = arrays[len(arrays) // 2:]
  return sum(a.bytes for a in arrays)


def _dims_used(instruction: Instruction) -> int | None:
  """How many dimensions of the torus the chosen algorithm uses at once, where the compiler says so."""
  config = instruction.attributes.get('backend_config', '')
  if found := re.search(r'"emitter":"(\d)D', config):
    return int(found[1])
  if found := re.search(r'num_dims:(\d)', config):
    return int(found[1])
  return 1 if '"strategy":"StrategyRing"' in config else None
