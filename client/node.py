"""What an institution says about its own node: where its data lies, what hardware tier it is, its limits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from flwr.app import Context
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_serializer, model_validator

from protocol.configuration import load, parse, read_yaml, value_of
from protocol.data_settings import DataPolicy, located
from protocol.errors import ConfigurationError
from protocol.mixture_settings import TaskFiles, TaskName
from protocol.plan import Plan
from protocol.secure_sum.terms import FEWEST_NODES
from protocol.strict import Name, Strict
from protocol.vault import Vault
from strategies.hardware import Hardware, override, probe
from strategies.narrowing import TierName

_PATHS = (
    "data_policy",
    "policy",
    "identity",
    "enrolled",
    "state",
    "folder",
    "whole_model",
    "vault",
    "audit",
    "device",
    "device_key",
    "device_own",
)
_ROWS = ("train", "evaluate", "replay", "probe")


def _mapping(given: Any) -> Any:
    return value_of(given) if isinstance(given, str) else given


class Node(Strict):
    """One node's own settings. Of these only ``name`` and ``adapter`` are sent; rank and precision hint at the tier."""

    name: Name = Field("node", max_length=80, description="what reports call this node")
    adapter: Name | None = Field(None, description="which of the federation's adapters it trains, where there are several")
    train: Path | None = Field(None, description="its training rows")
    evaluate: Path | None = Field(None, description="held-out rows; without it a share of the training rows is held out")
    tasks: Annotated[dict[TaskName, TaskFiles], BeforeValidator(_mapping)] = Field(
        {}, description="several tasks, each with its own rows, in place of train: {name: file} as YAML writes it"
    )
    replay: Path | None = Field(None, description="general rows that train beside its own, as many as the plan says")
    probe: Path | None = Field(None, description="general rows on which the plan's forgetting is measured; they never train")
    data_policy: Path | None = Field(
        None, description="YAML with cleaning, masking and augmentation that this institution does whatever a plan says"
    )
    policy: Path | None = Field(
        None, description="YAML with what this institution allows; looked at before anything else (docs/privacy.md)"
    )
    tier: TierName = Field("large", description="class of its hardware")
    max_rank: PositiveInt | None = Field(None, description="the institution's own limit on the rank")
    profile: Name | None = Field(None, description="a named machine to choose for, in place of this one: simulations")
    gpu_memory: Name | None = Field(None, description="memory of its GPU to choose for, such as 24GB, in place of what is here")
    trial: bool | None = Field(None, description="take one real step before joining; yes, but not in simulations")
    reward_functions: Name | None = Field(
        None, description="functions of this machine that a plan may call for rewards: module:function, with commas between"
    )
    models: Name | None = Field(
        None, description="models beside the base that a plan may use (teachers, writers, judges): names, folders of adapters"
    )
    endpoints: Name | None = Field(
        None, description="addresses that a plan may send prompts to, each with the variable of its key after a space, if any"
    )
    files: Name | None = Field(
        None, description="files that a plan may name for its treatment of rows (names, synonyms), with commas between"
    )
    identity: Path | None = Field(None, description="its private key, under which it is enrolled; for its own eyes alone")
    enrolled: Path | None = Field(
        None, description="YAML with everybody's name, public key and role; with it, only its coordinators are heard"
    )
    only_summed: bool = Field(False, description="its update goes into secure sums alone, whatever a coordinator asks for")
    fewest_summed: PositiveInt = Field(FEWEST_NODES, ge=FEWEST_NODES, description="how many nodes it is hidden among at least")
    state: Path | None = Field(None, description="folder for what it remembers from round to round and never sends")
    folder: Path | None = Field(None, description="keeps checkpoints, logs and the loss curve of each round")
    whole_model: Path | None = Field(
        None, description="folder for the whole model that full fine-tuning or freezing made in its last round"
    )
    vault: Path | None = Field(
        None,
        description="key file with which all that it keeps on disk is sealed: state, folder, whole_model (fedge vault keygen)",
    )
    vault_passphrase_env: Name | None = Field(
        None, description="environment variable with the key file's passphrase, where it is under one"
    )
    audit: Path | None = Field(
        None, description="file with a line for whatever it was asked, refused and sent, each chained to the last"
    )
    wipe: bool = Field(False, description="overwrite and remove the checkpoints and logs of a round as soon as it is trained")
    progress: bool = Field(False, description="say on standard error how far training is")

    device: Path | None = Field(
        None,
        description="bundle with training graphs: this node trains with numpy and onnxruntime, without PyTorch (docs/edge.md)",
    )
    device_key: Path | None = Field(None, description="public keys whose signature of that bundle counts, one a line")
    device_battery: float = Field(
        20.0, ge=0, le=100, description="device: per cent below which it neither joins nor trains, unless it is charging"
    )
    device_bytes: PositiveInt | None = Field(
        None, description="device: most bytes of rounds, both ways and of all federations, that it spends in 30 days"
    )
    device_own: Path | None = Field(
        None, description="device: folder for an adapter of its own on top of the federation's, which never leaves it"
    )
    device_own_seconds: PositiveFloat = Field(60.0, description="device: most that its own adapter may take of a round")

    @model_validator(mode="after")
    def _a_device_is_whole(self) -> "Node":
        if (self.device is None) != (self.device_key is None):
            raise ValueError("device and device_key belong together; name both the bundle and the key that signed it")
        if self.device_own and not self.device:
            raise ValueError("device_own is of a device; name its bundle in device, or leave this out")
        return self

    @model_validator(mode="after")
    def _rows_are_named(self) -> "Node":
        if not self.train and not self.tasks:
            raise ValueError("train is missing; name the file with the training rows, or tasks")
        if self.tasks and (self.train or self.evaluate):
            raise ValueError("tasks stand in place of train and evaluate; leave one or the other out")
        return self

    @model_validator(mode="after")
    def _known_and_knowing(self) -> "Node":
        if (self.identity is None) != (self.enrolled is None):
            raise ValueError("identity and enrolled belong together; name both the private key and the list of public ones")
        return self

    @model_validator(mode="after")
    def _a_passphrase_is_of_a_key(self) -> "Node":
        if self.vault_passphrase_env and not self.vault:
            raise ValueError("vault_passphrase_env is of the key file that vault names; name it, or leave this out")
        return self

    @field_serializer("tasks")
    def _flat(self, tasks: dict[str, TaskFiles]) -> str:
        """Flower's settings of a node are numbers and texts."""
        return json.dumps({name: {key: str(path) for key, path in files.files()} for name, files in tasks.items()})

    def sources(self) -> Mapping[str, TaskFiles]:
        """The files of every task; without tasks its own, under an empty name."""
        return self.tasks or ({"": TaskFiles(train=self.train, evaluate=self.evaluate)} if self.train else {})

    def treating(self, plan: Plan) -> Plan:
        """The plan with this institution's own treatment of rows added: it may do more than the plan says, never less.

        Raises:
            ConfigurationError: Every problem of the policy's file, or what plan and policy do not agree on.
        """
        if self.data_policy is None:
            return plan
        policy = load(self.data_policy, DataPolicy).beside(self.data_policy.resolve().parent)
        try:
            return plan.model_copy(update={"data": policy.added_to(plan.data)})
        except ValueError as error:
            raise ConfigurationError(str(self.data_policy), [str(error)]) from None

    def sealing(self) -> Vault | None:
        """The vault that seals what it keeps; None where it names none.

        Raises:
            VaultError: Its key cannot be read.
        """
        return Vault.at(self.vault, self.vault_passphrase_env) if self.vault else None

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

    def placed(node: Node) -> Node:
        own = {name: folder / value for name in _PATHS if (value := getattr(node, name))}
        rows: dict[str, Any] = {name: located(folder, value) for name in _ROWS if (value := getattr(node, name))}
        rows["tasks"] = {name: files.placed(lambda path: located(folder, path)) for name, files in node.tasks.items()}
        return node.model_copy(update=own | rows)

    return tuple(map(placed, nodes))
