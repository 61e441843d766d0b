"""Eight published distillation methods as one plugin: a gallery to measure with, and examples to write your own from.

    python run_exp1b_kaggle.py --mode smoke --plugin tests/published_methods.py --methods Direct AT RKD TAKD

In every loss `logits` are the student's, float32 [n, C], and `index` [n] says which training images they belong to.

The first four methods see the teacher's logits: `self.soft_targets` [N, C] are its probabilities, at the
temperature `self.temperature`, for all training images as the student sees them in this epoch.

The other four see features. `self.features` are the student's, {stage: [n, C, H, W]}, with gradient.
`self.descriptions` [N, D] is what `describe` makes of the teacher's: means over positions, unless a method says
otherwise. Descriptions are kept in fp16, which ends at 65504. These here are pooled activations, maps of length one
and a projection that keeps lengths: all far below.

Weights and temperatures are the published ones, or else those of the benchmarks that everyone uses (RepDistiller,
mdistiller). Where a method had to be adapted, its docstring says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from run_exp1b_kaggle import (
    Distillation,
    Method,
    TraditionalKD,
    larger_assistants,
    projection,
    register,
    relation_loss,
)


# -- methods that see logits ------------------------------------------------------------------------------------------
@register("DKD")
class DKD(TraditionalKD):
    """Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679).

    The divergence from the teacher falls into two parts, each with a weight of its own: whether it is the target
    class (weight 1), and the other classes among themselves (beta). TraditionalKD's loss does that where beta is
    not zero. Beta 8 is published, for CIFAR-100; a pilot tries smaller ones, because fewer classes want less. The
    authors' code lets the loss grow during the first 20 of 240 epochs; here the learning rate warms up instead.
    """

    @classmethod
    def candidates(cls, compression):
        return [Distillation(temperature=4.0, beta=beta) for beta in (8.0, 1.0, 2.0, 4.0)]

    @classmethod
    def configure(cls, compression, chosen):
        return chosen or cls.candidates(compression)[0]


def correlation(a, b):
    """Pearson's correlation of the rows of `a` [n, m] with those of `b`: [n]."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1)


@register("DIST")
class DIST(TraditionalKD):
    """Distillation from a stronger teacher (Huang et al. 2022, arXiv 2205.10536).

    The student's probabilities need not equal the teacher's, only correlate with them: over the classes of each
    image, and over the images of a batch for each class. T 4 and both weights are published for CIFAR-100; the
    factor T^2 is in the authors' code.
    """

    BETA, GAMMA = 2.0, 2.0

    @classmethod
    def configure(cls, compression, chosen):
        return chosen or Distillation(temperature=4.0)

    def loss(self, logits, index):
        labels = self.experiment.images.labels[index]
        student, teacher = F.softmax(logits / self.temperature, 1), self.soft_targets[index]
        over_classes = 1 - correlation(student, teacher).mean()
        over_images = 1 - correlation(student.T, teacher.T).mean()
        relations = self.BETA * over_classes + self.GAMMA * over_images
        return F.cross_entropy(logits, labels) + self.temperature**2 * relations


def standardised(logits):
    """Logits [n, C] with mean 0 and standard deviation 1 per image."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


@register("LSKD")
class LSKD(TraditionalKD):
    """Distillation of standardised logits (Sun et al. 2024, arXiv 2403.01427).

    The student learns how the teacher ranks the classes, not how large its logits are. T 2 and both weights are
    published for pairs of ResNets on CIFAR-100.
    """

    CROSS_ENTROPY, DIVERGENCE = 0.1, 9.0

    @classmethod
    def configure(cls, compression, chosen):
        return chosen or Distillation(temperature=2.0)

    def soft_targets_of(self, page):
        logits = self.experiment.outputs.page(self.config.teachers, page)[0].float()
        return F.softmax(standardised(logits) / self.temperature, 1)

    def loss(self, logits, index):
        student = F.log_softmax(standardised(logits) / self.temperature, 1)
        divergence = F.kl_div(student, self.soft_targets[index], reduction="batchmean")
        cross_entropy = F.cross_entropy(logits, self.experiment.images.labels[index])
        return self.CROSS_ENTROPY * cross_entropy + self.DIVERGENCE * self.temperature**2 * divergence


@register("TAKD")
class TAKD(TraditionalKD):
    """Distillation from a teacher assistant (Mirzadeh et al. 2020, arXiv 1902.03393).

    Hinton's loss, from the smallest assistant that is larger than the student. The authors searched for weight and
    temperature; here they are TraditionalKD's, so that only the teacher differs. The assistant is the run's own,
    which is distilled by HPM-KD's default.
    """

    @classmethod
    def teachers(cls, compression):
        return larger_assistants(compression)[-1:]

    @classmethod
    def configure(cls, compression, chosen):
        return chosen or Distillation(teachers=cls.teachers(compression))


# -- methods that see features ----------------------------------------------------------------------------------------
class FeatureMethod(Method):
    """What the following four share: cross-entropy, and a weighted loss between features and the teacher's."""

    weight: float

    @classmethod
    def teachers(cls, compression):
        return ("teacher",)

    @classmethod
    def configure(cls, compression, chosen):
        return chosen or Distillation(weight=cls.weight)

    def loss(self, logits, index):
        teacher = self.descriptions[index].float()
        return super().loss(logits, index) + self.config.weight * self.feature_loss(teacher)

    def feature_loss(self, teacher):
        """Loss (scalar) of the student's features against the teacher's description [n, D] of the same images."""
        raise NotImplementedError


@register("AT")
class AT(FeatureMethod):
    """Attention transfer (Zagoruyko and Komodakis 2017, arXiv 1612.03928).

    A stage's attention map is the mean of f^2 over its channels, scaled to length one. The loss is the squared
    difference of the maps, mean over positions, sum over stages, times 1,000. The first of the four stages is left
    out: its map alone has three times as many numbers as the others together.
    """

    stages = ("stage2", "stage3", "stage4")
    weight = 1000.0

    @staticmethod
    def describe(features):
        maps = [
            F.normalize(torch.linalg.vector_norm(f, dim=1).square().flatten(1)) for f in features.values()
        ]
        # Scaled once more: a sum of squares is then the sum over stages of the mean over positions.
        return torch.cat([m / m.shape[1] ** 0.5 for m in maps], 1)

    def feature_loss(self, teacher):
        return (self.describe(self.features) - teacher).square().sum(1).mean()


@register("SP")
class SP(FeatureMethod):
    """Similarity-preserving distillation (Tung and Mori 2019, arXiv 1907.09682).

    Images that are alike to the teacher shall be alike to the student: 3,000 times the mean squared difference of
    their similarities, from the whole last stage. Kept of the teacher's are the channels' means and a random
    projection of the deviations from them. That changes the similarities by 7% (Frobenius norm, 128 images, a
    teacher of width 8 after 6 epochs on SYNTHETIC; 13% if all is projected, 22% with the means alone).
    """

    stages = ("stage4",)
    weight = 3000.0

    @staticmethod
    def describe(features):
        maps = features["stage4"].flatten(2)  # [n, C, positions]
        means = maps.mean(2, keepdim=True)
        deviations = (maps - means).flatten(1)
        means = means.flatten(1) * maps.shape[2] ** 0.5  # as long as they are in the whole map
        return torch.cat([means, deviations @ projection(deviations.shape[1], maps.device)], 1)

    def feature_loss(self, teacher):
        return relation_loss(self.features["stage4"].flatten(1), teacher)


def distances_and_angles(x):
    """Of images x [n, D]: distances [n, n] relative to their mean; cosines [n, n, n] of the angles at each image."""
    n, differences = len(x), x[:, None] - x
    distances = differences.norm(dim=2)
    mean = distances.sum() / max(n * (n - 1), 1)
    directions = F.normalize(differences, dim=2)
    return distances / mean.clamp_min(1e-12), directions @ directions.mT


@register("RKD")
class RKD(FeatureMethod):
    """Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068).

    Distances between images and angles between triples of them shall be the teacher's, by Huber's loss, with the
    weights 25 and 50. An image is its last stage, pooled.
    """

    stages = ("stage4",)
    weight = 25.0
    ANGLES = 2.0  # relative to the distances

    def feature_loss(self, teacher):
        student_distances, student_angles = distances_and_angles(self.describe(self.features))
        teacher_distances, teacher_angles = distances_and_angles(teacher)
        distances = F.smooth_l1_loss(student_distances, teacher_distances)
        return distances + self.ANGLES * F.smooth_l1_loss(student_angles, teacher_angles)


@register("Hint")
class Hint(FeatureMethod):
    """A hint as in FitNets (Romero et al. 2015, arXiv 1412.6550), on the pooled last stage.

    A regressor, trained beside the student, predicts the teacher's features from the student's: 100 times the mean
    squared error. The regressor is the benchmarks', with batch normalisation: without it a student collapsed.
    The teacher's features are divided by their standard deviation, one number over all images and channels, so that
    the weight means the same for every teacher. The authors' hint is a middle layer, learned before the rest.
    """

    stages = ("stage4",)
    weight = 100.0

    def modules(self, student, teacher):
        channels = teacher["stage4"]
        return nn.Sequential(nn.Linear(student["stage4"], channels), nn.BatchNorm1d(channels), nn.ReLU())

    def start_epoch(self, epoch, losses):
        self.scale = self.descriptions.float().std().clamp_min(1e-6)

    def feature_loss(self, teacher):
        return F.mse_loss(self.module(self.describe(self.features)), teacher / self.scale)
