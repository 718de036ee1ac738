"""The table of closed-form merges that the command line, the docs and the common tests read. Imports no torch.

Adding a method is a class in the file of its family and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..construct import construct, describe
from ..errors import unknown

if TYPE_CHECKING:
    from .merge import Merge


@dataclass(frozen=True)
class Entry:
    """Where a merge lives ("module:Class", relative to this package), what it does, who proposed it.

    needs: "" for checkpoints alone, or the kind of statistics of the experts ("fisher", "gram").
    """

    target: str
    summary: str
    source: str
    needs: str = ""

    def load(self) -> type[Merge]:
        """Import the class."""
        module, name = self.target.split(":")
        found: type[Merge] = getattr(import_module(f".{module}", __package__), name)
        return found


MERGES: dict[str, Entry] = {
    "average": Entry(
        "linear:Average",
        "The mean of the experts, weighted if you like.",
        "Wortsman et al. (2022), Model soups (uniform soup)",
    ),
    "task-arithmetic": Entry(
        "linear:TaskArithmetic",
        "Base plus scaled sum of task vectors; a negative weight unlearns.",
        "Ilharco et al. (2023), Editing Models with Task Arithmetic",
    ),
    "negation": Entry(
        "linear:Negation",
        "Base minus the scaled sum of task vectors: forget what the experts learned.",
        "Ilharco et al. (2023), Editing Models with Task Arithmetic, section 3",
    ),
    "analogy": Entry(
        "linear:Analogy",
        "Three experts: base + τ_c + (τ_b − τ_a), as a is to b so is c to the result.",
        "Ilharco et al. (2023), Editing Models with Task Arithmetic, section 5",
    ),
    "paint": Entry(
        "linear:Paint",
        "(1 − Σα) base + Σ α_t expert_t.",
        "Ilharco et al. (2022), Patching Open-Vocabulary Models by Interpolating Weights (PAINT)",
    ),
    "wise-ft": Entry(
        "linear:WiseFT",
        "One expert: (1 − α) base + α expert.",
        "Wortsman et al. (2022), Robust Fine-Tuning of Zero-Shot Models (WiSE-FT)",
    ),
    "expo": Entry(
        "linear:Expo",
        "One expert: extrapolate beyond it, expert + α (expert − base).",
        "Zheng et al. (2024), Weak-to-Strong Extrapolation Expedites Alignment (ExPO)",
    ),
    "swa": Entry(
        "linear:SWA",
        "The running mean of a sequence of checkpoints, in the order given, from one of them on.",
        "Izmailov et al. (2018), Averaging Weights Leads to Wider Optima and Better Generalization",
    ),
    "ema": Entry(
        "linear:EMA",
        "The exponential moving average of a sequence of checkpoints, in the order given.",
        "Polyak and Juditsky (1992), averaging; Tarvainen and Valpola (2017), Mean Teachers",
    ),
    "ties": Entry(
        "signs:Ties",
        "Trim small entries, elect signs, and average what agrees.",
        "Yadav et al. (2023), TIES-Merging: Resolving Interference When Merging Models",
    ),
    "magmax": Entry(
        "signs:MagMax",
        "Of each entry, the task vector of largest magnitude.",
        "Marczak et al. (2024), MagMax: Leveraging Model Merging for Seamless Continual Learning",
    ),
    "emr": Entry(
        "signs:Emr",
        "The unified vector of EMR: elected sign, largest agreeing magnitude.",
        "Huang et al. (2024), EMR-Merging: Tuning-Free High-Performance Model Merging",
    ),
    "dare": Entry(
        "sparse:DareLinear",
        "Task arithmetic on task vectors with entries dropped at random and the rest rescaled.",
        "Yu et al. (2024), Language Models are Super Mario (DARE)",
    ),
    "dare-ties": Entry(
        "sparse:DareTies",
        "DARE, then the sign election of TIES.",
        "Yu et al. (2024), Language Models are Super Mario (DARE)",
    ),
    "della": Entry(
        "sparse:DellaTies",
        "Drop small entries more often, rescale, elect signs, and average what agrees.",
        "Deep et al. (2024), DELLA-Merging",
    ),
    "della-linear": Entry(
        "sparse:DellaLinear",
        "Drop small entries more often, rescale, and add.",
        "Deep et al. (2024), DELLA-Merging",
    ),
    "breadcrumbs": Entry(
        "sparse:BreadcrumbsLinear",
        "Task arithmetic without the largest and the smallest entries of each tensor.",
        "Davari and Belilovsky (2024), Model Breadcrumbs",
    ),
    "breadcrumbs-ties": Entry(
        "sparse:BreadcrumbsTies",
        "Breadcrumbs, then the sign election of TIES.",
        "Davari and Belilovsky (2024), Model Breadcrumbs; Yadav et al. (2023), TIES-Merging",
    ),
    "tall-mask": Entry(
        "masks:TallMask",
        "One expert's model, retrieved from the sum of all task vectors by its TALL mask.",
        "Wang et al. (2024), Localizing Task Information for Improved Model Merging and Compression",
    ),
    "consensus": Entry(
        "sparse:ConsensusLinear",
        "Task arithmetic on the entries that at least k experts need (TALL masks).",
        "Wang et al. (2024), Localizing Task Information for Improved Model Merging and Compression",
    ),
    "quadratic": Entry(
        "quadratic:Quadratic",
        "Nearest point to all experts in a metric (identity, Fisher, Gram), free or in a hull or box.",
        "Matena and Raffel (2022); Jin et al. (2023); Tam et al. (2024), whose merges are members",
    ),
    "fisher": Entry(
        "fisher:Fisher",
        "Of each entry, the mean of the experts weighted by their diagonal Fishers.",
        "Matena and Raffel (2022), Merging Models with Fisher-Weighted Averaging",
        "fisher",
    ),
    "ewc": Entry(
        "fisher:Ewc",
        "Two experts, weighted by their diagonal Fishers.",
        "Leontev et al. (2020), Non-Iterative Knowledge Fusion in Deep Convolutional Networks",
        "fisher",
    ),
    "uncertainty": Entry(
        "fisher:Uncertainty",
        "Task vectors weighted by their Fishers over that of all tasks and a prior.",
        "Daheim et al. (2024), Model Merging by Uncertainty-Based Gradient Matching",
        "fisher",
    ),
    "regmean": Entry(
        "regmean:RegMean",
        "The outputs of linear maps in least squares, from Grams of their inputs; the mean elsewhere.",
        "Jin et al. (2023), Dataless Knowledge Fusion by Merging Weights of Language Models",
        "gram",
    ),
    "mats": Entry(
        "regmean:Mats",
        "The system of RegMean by conjugate gradients, from the average or the base.",
        "Tam et al. (2024), Merging by Matching Models in Task Parameter Subspaces (MaTS)",
        "gram",
    ),
    "pcb": Entry(
        "pcb:Pcb",
        "Each entry weighed by its magnitude within its task and its agreement with the others.",
        "Du et al. (2024), Parameter Competition Balancing for Model Merging (PCB-Merging)",
    ),
    "metagpt": Entry(
        "norms:MetaGPT",
        "The average weighted by the squared norms of the task vectors.",
        "Zhou et al. (2024), MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic",
    ),
    "model-stock": Entry(
        "norms:ModelStock",
        "Between base and average, tensor by tensor, as far as the angle between task vectors says.",
        "Jang et al. (2024), Model Stock: All We Need Is Just a Few Fine-Tuned Models",
    ),
    "slerp": Entry(
        "spherical:Slerp",
        "Two experts: along the arc from one to the other, tensor by tensor.",
        "Shoemake (1985), Animating Rotation with Quaternion Curves",
    ),
    "spherical-mean": Entry(
        "spherical:SphericalMean",
        "The direction nearest to all, with the mean norm, tensor by tensor.",
        "Buss and Fillmore (2001), Spherical Averages; Karcher (1977)",
    ),
    "tsv-m": Entry(
        "spectral:TSVM",
        "Matrices: the top singular directions of each expert, whitened against those of the others.",
        "Gargiulo et al. (2025), Task Singular Vectors: Reducing Task Interference in Model Merging",
    ),
    "iso-c": Entry(
        "spectral:IsoC",
        "Matrices: the sum of task vectors with all singular values made equal.",
        "Marczak et al. (2025), No Task Left Behind: Isotropic Model Merging",
    ),
    "iso-cts": Entry(
        "spectral:IsoCTS",
        "Iso-C with a part of the directions taken from each task.",
        "Marczak et al. (2025), No Task Left Behind: Isotropic Model Merging",
    ),
    "knots": Entry(
        "spectral:Knots",
        "Matrices: TIES in the common singular basis of all updates.",
        "Stoica et al. (2025), Model Merging with SVD to Tie the Knots (KnOTS)",
    ),
    "trimmed-mean": Entry(
        "robust:TrimmedMean",
        "Of each entry, the mean without its largest and smallest values: bounded whatever a few experts send.",
        "Yin et al. (2018), Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    ),
    "median": Entry(
        "robust:Median",
        "Of each entry, the median of the experts.",
        "Yin et al. (2018), Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    ),
    "geometric-median": Entry(
        "robust:GeometricMedian",
        "The point of least mean distance to the experts, over the whole model.",
        "Pillutla, Kakade and Harchaoui (2022), Robust Aggregation for Federated Learning",
    ),
    "krum": Entry(
        "robust:Krum",
        "The expert next to most others, or the mean of the best few (multi-Krum).",
        "Blanchard et al. (2017), Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
    ),
    "fedexp": Entry(
        "extrapolated:FedExP",
        "The average extrapolated by how much the task vectors disagree, up to a cap.",
        "Jhunjhunwala, Wang and Joshi (2023), FedExP: Speeding Up Federated Averaging via Extrapolation",
    ),
    "stable": Entry(
        "extrapolated:Stable",
        "Base plus the sum of task vectors over λ_max of their cosines: a step that repeated rounds bear.",
        "Gradient descent on a quadratic: Nesterov (2018), Lectures on Convex Optimization, section 2.1",
    ),
}


def merge_class(name: object) -> type[Merge]:
    """Return the class of this name; OptionError suggests the nearest one."""
    if not isinstance(name, str) or name not in MERGES:
        raise unknown("method", name, MERGES)
    return MERGES[name].load()


def make_merge(spec: object) -> Merge:
    """Return a merge from an instance, a name, or a mapping {"name": ..., option: value}.

    Raises OptionError for unknown names and options, with the nearest known one, and for values out of range.
    """
    name: Any = spec.get("name") if isinstance(spec, Mapping) else spec
    if isinstance(spec, (str, Mapping)):
        return construct("method", {str(name): merge_class(name)}, spec)
    return construct("method", {name: entry.load() for name, entry in MERGES.items()}, spec)


def describe_merge(merge: Merge) -> dict[str, Any]:
    """Return the mapping from which `make_merge` makes this merge again."""
    module, cls = type(merge).__module__.rpartition(".")[2], type(merge).__name__
    name = next((name for name, entry in MERGES.items() if entry.target == f"{module}:{cls}"), None)
    return describe(merge, {name: type(merge)} if name is not None else {cls: type(merge)})
