"""What a coordinator promises a node in a call, and whose noise makes it true: typed and bounded, for it comes from outside."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from protocol.privacy.clipping import AdaptiveNorm
from protocol.privacy.concentrated import rho
from protocol.privacy.noise import NodesNoise, Stream
from protocol.secure_sum.fixed_point import Words
from protocol.secure_sum.terms import Terms

_Positive = Annotated[float, Field(gt=0, le=1e9)]
_Noise = Annotated[float, Field(ge=1e-6, le=1e9)]  # whose square is still a number
_VOTE = 0.5  # what a node adds to the sum of votes, or takes from it (protocol.privacy.clipping.AdaptiveNorm)


class Promise(BaseModel):
    """What is done to a node's update, and what of it is promised.

    Attributes:
        epsilon, delta: What all rounds of the federation together stay within.
        clipping_norm: ``C``, to which the whole change is shortened in this round.
        noise_multiplier: Of each noised sum, over ``C``.
        noise: ``nodes``: each adds its share before its part is masked, and nobody ever holds a sum without.
        colluders: So many nodes' noise is not counted on.
        bit_noise: Nodes also vote on whether their change was within ``C``; standard deviation of the noise on the votes' sum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epsilon: _Positive
    delta: float = Field(gt=0, lt=1)
    clipping_norm: float = Field(ge=1e-12, le=1e6)
    noise_multiplier: _Noise
    noise: Literal["coordinator", "nodes"]
    colluders: int = Field(0, ge=0, le=2**20)
    bit_noise: _Noise | None = None

    def votes(self, phase: int) -> int:
        """Entries at the end of a phase's vector that are votes: one, or none."""
        return int(self.bit_noise is not None and phase == 0)

    def cost(self, phase: int) -> float:
        """Of a phase's sum: ``protocol.privacy.concentrated.rho``."""
        votes = rho(AdaptiveNorm(self.bit_noise).noise_multiplier) if self.bit_noise and self.votes(phase) else 0.0
        return rho(self.noise_multiplier) + votes

    def limit(self, terms: Terms) -> float:
        """Of the fixed point of a sum whose nodes add noise: whatever they send, the sum does not wrap around."""
        return max(noise.limit for _, noise in self._noises(terms)) if self.noise == "nodes" else self.clipping_norm

    def add_noise(self, terms: Terms, words: Words, stream: Stream | None = None) -> None:
        """Adds a node's share to its words, in place, where nodes add noise; the first is its weight, which all have alike.

        Args:
            terms: Of the sum.
            words: Its vector in the sum's fixed point, not masked yet.
            stream: Where from; without it a new one.

        Raises:
            PrivacyError: The shares would not add up to what is promised.
        """
        if self.noise == "nodes":
            for part, noise in self._noises(terms):
                noise.add(words[part], terms.fixed_point.scale, stream)

    def spread(self, terms: Terms, survivors: int) -> float:
        """Standard deviation of each value of a sum that so many nodes have added their noise to."""
        (_, noise), *_ = self._noises(terms)
        return noise.steps(terms.fixed_point.scale) / terms.fixed_point.scale * math.sqrt(survivors)

    def _noises(self, terms: Terms) -> list[tuple[slice, NodesNoise]]:
        nodes, counted, votes = len(terms.nodes), terms.fewest() - self.colluders, self.votes(terms.phase)
        values = terms.length - 1 - votes
        found = [(slice(1, 1 + values), NodesNoise(self.noise_multiplier, self.clipping_norm, values, nodes, counted))]
        if votes:
            bits = AdaptiveNorm(self.bit_noise or 0.0).noise_multiplier
            found.append((slice(1 + values, None), NodesNoise(bits, _VOTE, 1, nodes, counted)))
        return found
