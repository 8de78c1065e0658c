"""What a plan promises each training row: DP-SGD's settings, and what of a plan would break the promise."""

from pydantic import Field, PositiveFloat

from protocol.strict import Strict


class ExamplePrivacySettings(Strict):
    """Each row's own privacy (DP-SGD, Abadi et al. 2016, arXiv:1607.00133): ``strategies.example_privacy`` carries it out.

    A step takes each row with the same small chance, shortens every row's own gradient to ``clipping_norm``, and adds noise to
    their sum. What all steps of all rounds tell of any one row is bounded by ``epsilon`` at ``delta``.
    """

    epsilon: PositiveFloat = Field(description="what all steps of all rounds together may tell of one row")
    delta: float = Field(1e-5, gt=0, lt=1, description="chance that they tell more; below one over the rows")
    clipping_norm: PositiveFloat = Field(
        1.0, description="norm to which each row's gradient is shortened, over all that trains"
    )
    noise_multiplier: PositiveFloat | None = Field(
        None, description="the noise's standard deviation over clipping_norm; without it the least that reaches epsilon"
    )
