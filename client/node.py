"""What an institution says about its own node: where its data lies, what hardware tier it is, its limits."""

from pathlib import Path

from flwr.app import Context
from pydantic import Field, PositiveInt

from protocol.configuration import parse, read_yaml
from protocol.errors import ConfigurationError
from protocol.strict import Name, Strict
from strategies.hardware import Hardware, override, probe
from strategies.narrowing import TierName

_PATHS = ("train", "evaluate", "state", "folder", "whole_model")


class Node(Strict):
    """One node's own settings. Of these only ``name`` and ``adapter`` are sent; rank and precision hint at the tier."""

    name: Name = Field("node", max_length=80, description="what reports call this node")
    adapter: Name | None = Field(None, description="which of the federation's adapters it trains, where there are several")
    train: Path = Field(description="its training rows")
    evaluate: Path | None = Field(None, description="held-out rows; without it a share of the training rows is held out")
    tier: TierName = Field("large", description="class of its hardware")
    max_rank: PositiveInt | None = Field(None, description="the institution's own limit on the rank")
    profile: Name | None = Field(None, description="a named machine to choose for, in place of this one: simulations")
    gpu_memory: Name | None = Field(None, description="memory of its GPU to choose for, such as 24GB, in place of what is here")
    trial: bool | None = Field(None, description="take one real step before joining; yes, but not in simulations")
    reward_functions: Name | None = Field(
        None, description="functions of this machine that a plan may call for rewards: module:function, with commas between"
    )
    state: Path | None = Field(None, description="folder for what it remembers from round to round and never sends")
    folder: Path | None = Field(None, description="keeps checkpoints and TensorBoard logs of each round")
    whole_model: Path | None = Field(
        None, description="folder for the whole model that full fine-tuning or freezing made in its last round"
    )
    progress: bool = Field(False, description="show progress bars")

    @property
    def described(self) -> bool:
        """It chooses for another machine than this one."""
        return self.profile is not None or self.gpu_memory is not None

    def hardware(self) -> Hardware:
        """The machine that it chooses for: this one, or the one that it says. Nothing of it is sent.

        Raises:
            ConfigurationError: There is no such machine.
        """
        return override(probe(), profile=self.profile, gpu_memory=self.gpu_memory)


class Nodes(Strict):
    """Several nodes in one file, for simulations: a node's place in the list is its partition."""

    nodes: tuple[Node, ...] = Field(min_length=1)


def from_context(context: Context) -> Node:
    """The node that Flower started: ``--node-config`` on a SuperNode, or a line of the ``nodes`` file in a simulation.

    Raises:
        ConfigurationError: Neither is there, or it does not fit.
    """
    own = {key: value for key, value in context.node_config.items() if key not in ("partition-id", "num-partitions")}
    if own:
        return parse({key.replace("-", "_"): value for key, value in own.items()}, Node, source="node config")
    listed = str(context.run_config.get("nodes", ""))
    if not listed:
        raise ConfigurationError("node config", ["train: missing; start the node with --node-config 'train=\"rows.jsonl\"'"])
    nodes = read_nodes(Path(listed))
    at = int(context.node_config.get("partition-id", 0))
    if at >= len(nodes):
        raise ConfigurationError(listed, [f"nodes: {len(nodes)} listed, this is number {at + 1}; list every node"])
    return nodes[at]


def read_nodes(path: Path) -> tuple[Node, ...]:
    """Nodes of a YAML file; their paths are relative to it.

    Raises:
        ConfigurationError: Every problem of the file.
    """
    return beside(path, parse(read_yaml(path), Nodes, source=str(path)).nodes)


def beside(path: Path, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The nodes with relative paths taken from the folder of the file that names them."""
    folder = path.resolve().parent
    return tuple(
        node.model_copy(update={name: folder / value for name in _PATHS if (value := getattr(node, name))}) for node in nodes
    )
