"""What `planish inspect` finds, as data: plain frozen dataclasses of numbers, strings and tuples, so that they go to JSON and back.

Layers are decoder blocks, counted from 0; "layer l" of a hidden state is the output of block l, and -1 the embeddings. Positions are token positions
in a window. All magnitudes are of the model's own units.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...quant.errors import PlanishError
from ..blocks.sites import kind_of

TRANSFORMS = ("plain", "smooth", "hadamard", "both")
SCHEMES = ("w8a8", "w4a8", "w4a4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The criteria, each with its source.

    massive_floor, massive_ratio: |h| above both the floor and ratio times the layer's median is massive (Sun et al. 2024, section 2).
    large_ratio: values above this times the median are listed too. constant_spread: a massive activation whose standard deviation over samples is
    below this share of its mean does not depend on the input (Sun et al. 2024, section 4).
    spike_floor, spike_ratio: a spike at down_proj's input or output is above the floor (Yu et al. 2024, section 3) and above ratio times the median,
    so that models of other units show only what is out of the ordinary. spike_share: a super weight's product is at least this share of the output
    spike; spike_left: and the spike at least this share of the layer's largest output. weight_ratio, weight_spike: a weight above weight_ratio times
    the layer's median weight needs no spike at its input, and only weight_spike times the median at its output (these four are ours, see
    super_weights.py).
    sink_score: a head whose queries give token 0 more attention than this on average is a sink head. dormant_score, value_drain: it is dormant if it
    gives token 0 more than dormant_score and token 0's value norm is below value_drain times the median token's (Guo et al. 2024, section 2).
    outlier_token: a token is an outlier at a site if its maximum exceeds this times the median token's (Chen et al. 2024, PrefixQuant, section 4.1).
    prefix_share: a token belongs in the prefix if it is an outlier beyond position 0 in more than this share of the samples that hold it there (ours:
    a token that is one here and there is so because of its place, and as a prefix it catches nothing: " the", an outlier in 4 of the demo model's 16
    samples, still is one in 4 of them with " the" before each).
    site_spike: a site's largest value is due to sink tokens if it is above this times that of ordinary ones. site_kurtosis: a site whose ordinary
    tokens have a kurtosis above this is hard by itself (both ours, for the findings).
    """

    massive_floor: float = 100.0
    massive_ratio: float = 1000.0
    large_ratio: float = 100.0
    constant_spread: float = 0.1
    spike_floor: float = 50.0
    spike_ratio: float = 1000.0
    spike_share: float = 0.5
    spike_left: float = 0.1
    weight_ratio: float = 100.0
    weight_spike: float = 20.0
    sink_score: float = 0.3
    dormant_score: float = 0.9
    value_drain: float = 0.3
    outlier_token: float = 64.0
    prefix_share: float = 0.5
    site_spike: float = 8.0
    site_kurtosis: float = 2000.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not value > 0:
                raise PlanishError(f"thresholds.{name} is {value}, but must be positive.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMagnitudes:
    """Size of the hidden states after one layer. top: the three largest |h| of a sample, descending. median: of |h|. massive, large: how many values
    are beyond massive_ratio (and the floor) and large_ratio, at most 256 a sample. residual_peak: norm of token 0 over the median token's norm.
    All but the counts are means over samples."""

    layer: int
    top: tuple[float, float, float]
    median: float
    massive: int
    large: int
    residual_peak: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MassiveActivation:
    """One channel that is massive at one position or token. layer: where it is largest against the layer's median; born: the first layer with it,
    died: the first one without it again, None if it lives to the end; with it means in at least half as many samples as in any layer.
    value: mean over the samples that have it, largest: the one of largest magnitude, spread: standard deviation over them as a share of |value|.
    constant: spread below constant_spread.
    token: the token's text if it is always the same one. share: of the samples in which it is massive. position None: at varying positions.
    by_layer: mean value of the channel at these tokens after each layer, from layer -1 on; where positions vary, 0 before they are known.
    massive: whether it meets massive_ratio in a quarter of the samples at least, else only large_ratio."""

    layer: int
    position: int | None
    token: str | None
    channel: int
    value: float
    largest: float
    ratio: float
    spread: float
    constant: bool
    share: float
    born: int
    died: int | None
    massive: bool
    by_layer: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervention:
    """What the model's quality is when something is changed. quality: perplexity on the same held-out text (of vision models: relative change of the
    final features). layer: after which the hidden state was changed, or whose weights; None for the unchanged model."""

    name: str
    layer: int | None
    quality: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SuperWeight:
    """One weight at which a spike of down_proj's input and one of its output meet. row: output channel, column: input channel. activation: the value
    at its input, output: at its output. quality: as in Intervention, with this weight set to 0, None if not measured. published: whether the model's
    published index lists it, None if the model is not in the index."""

    module: str
    layer: int
    row: int
    column: int
    value: float
    activation: float
    output: float
    quality: float | None = None
    published: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkHead:
    """One attention head that attends mostly to token 0. drain: norm of token 0's value vector over the median token's."""

    layer: int
    head: int
    score: float
    drain: float
    dormant: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """All heads: score and drain by layer, then head. windows: how many samples it was measured on."""

    score: tuple[tuple[float, ...], ...]
    drain: tuple[tuple[float, ...], ...]
    windows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierToken:
    """A token that is an outlier at some site. count: samples in which it is one; initial: those in which it is one at position 0; inside: at another
    position; present: those that hold it at another position, outlier or not. ratio: largest of its maximum over the median token's; site: where
    ("11.down")."""

    token_id: int
    text: str
    count: int
    initial: int
    inside: int
    present: int
    ratio: float
    site: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """The suggested full-precision prefix (PrefixQuant, section 4.2). length: mean number of outlier tokens in a sample at the worst site, rounded
    up; there may be fewer token_ids, for the first position counts in it whichever token it holds, and tokens below prefix_share are left out."""

    token_ids: tuple[int, ...]
    text: str
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """How hard one site's input is. absmax: largest |x|. kurtosis: E[x^4] / E[x^2]^2 over all values (3 for a Gaussian). crest: largest |x| over the
    root mean square. difficulty: standard deviation of the channels' magnitudes ||X_:j||_2 / sqrt(tokens) ("Turning LLM Activations
    Quantization-Friendly", 2025, section 3). token_ratio: largest token maximum over the median token's."""

    absmax: float
    kurtosis: float
    crest: float
    difficulty: float
    token_ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteFigures:
    """One site of one block. every: over all tokens; ordinary: without the sink tokens, which are those with a massive activation in the block, and
    in language models without position 0, a sink in most blocks of most models. sink_tokens: how many have a massive activation.
    errors: scheme -> transform -> relative error ||Y - Y_quantized|| / ||Y|| of the readers' output over ordinary tokens, all rounded to nearest,
    weights per channel, activations dynamic per token; empty where the readers are quantized already. errors_every: the same over all tokens.
    hosted: whether smoothing is free here. channel_absmax: largest |x| of ordinary tokens by channel, in at most 256 bins of neighbouring channels;
    channel_absmax_after: the same after a transform of TRANSFORMS."""

    block: int
    site: str
    channels: int
    every: Figures
    ordinary: Figures
    sink_tokens: int
    hosted: bool
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors_every: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    channel_absmax: tuple[float, ...] = ()
    channel_absmax_after: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As recipes name it: "11.down"."""
        return f"{self.block}.{self.site}"

    @property
    def kind(self) -> str:
        """The site's name, that of all experts where it is an expert's: "down"."""
        return kind_of(self.site)


@dataclass(frozen=True, kw_only=True, slots=True)
class Landscape:
    """|h| of one sample after one layer, for the picture: values[position][bin], the largest |h| of each bin of neighbouring channels.
    positions: of the rows. channels: first channel of each bin (the last bin ends at width)."""

    layer: int
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    channels: tuple[int, ...]
    width: int
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One choice of the recommended recipe and its reason, in words."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """A recipe as YAML text, and why it is so."""

    recipe: str
    scheme: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierReport:
    """Everything that was found in one model. text: where the samples came from. quality: what Intervention.quality is: perplexity or feature change.
    seconds and peak_bytes are of the inspection."""

    model: str
    family: str
    blocks: int
    hidden: int
    compressed: bool
    text: str
    samples: int
    length: int
    thresholds: Thresholds
    quality: str
    magnitudes: tuple[LayerMagnitudes, ...]
    massive: tuple[MassiveActivation, ...]
    interventions: tuple[Intervention, ...]
    super_weights: tuple[SuperWeight, ...]
    sink_heads: tuple[SinkHead, ...]
    attention: Attention | None
    outlier_tokens: tuple[OutlierToken, ...]
    prefix: Prefix | None
    sites: tuple[SiteFigures, ...]
    landscapes: tuple[Landscape, ...]
    recommendation: Recommendation | None
    findings: tuple[str, ...]
    seconds: float
    peak_bytes: int
