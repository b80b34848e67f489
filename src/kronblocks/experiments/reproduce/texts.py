"""What the page of the experiments says beside its tables."""

from __future__ import annotations

OURS = "two-phase"

INTRO = """# Experiments

<!-- written by `kronblocks reproduce tables` from benchmarks/results: do not edit -->

Every method is tuned alike, on **validation** accuracy and with other seeds than those below: first three learning rates times
two values of its own second setting, then, one step of one setting at a time, the neighbours of the best trial, as long as one
of them is better. The best trial is the one that is compared; how many were tried stands beside it. Test images decide nothing.
Accuracies are of the last epoch. Zeros are counted exactly, in blocks. Differences are paired by seed, with their 95% interval
(Student's t). The best sparse method of a comparison is bold, whoever it is. Multiply-adds of training are those of products in
forward and backward, attention's among them, as each layer computed at that density, growth scores included; those of inference
leave zero blocks out, whatever method made them; "parameters" are those trained at the most and at the end; "bytes" are
parameters, gradients, optimiser state and tensors kept for backward at their largest; all relative to dense. Several trainings
ran at a time on a machine that had other work too, so their seconds are not told here: [whole trainings of all
methods](benchmarks.md#whole-trainings) were timed one after the other. Where a study names another way of choosing settings,
that holds. Ranges are so wide that hardly any best trial lies at an end where more could have been tried: the rate of `static` on
linear-fashion (0.512), the regrowth of `rigl` on linear-mnist5k (0.7), on the MLP pruning that ends at a tenth of the training
(`iterative` at 4x4, `elastic-group-lasso` at 16x16), and there the rank of `kron-l1` at 16x16 (64).

What these comparisons do not settle: one or two seeds a trial leave tenths of a point to chance, in the choice of every
method's settings. What `two-phase` does by default (when it prunes and lifts, rank, rates of factors and values, tile banks)
was found by the ablation below, on the MLP, with the same validation images and three of the five seeds as in the table of the
MLP: more trials than any baseline had, so that table may favour it by a little. The linear model, LeNet-5 and the transformers,
for which nothing of it was chosen, are the check. The five folds of the linear model share training images, so its intervals
are somewhat too narrow. All intervals are over seeds, on one test set: 10,000 images leave an accuracy of 90% uncertain by 0.3
points, and most of that is common to two methods, but not all; on the validation images, by which every method was tuned,
differences of the same trainings differ by up to 0.45 points from those on the test images (both are in the results' files).
How much the lassos shrink follows from the schedule, so their strength is not tuned; what the penalty does in the loss, with a
strength of its own, is a study by itself below.
"""

REPRODUCE = """## How to reproduce

```sh
pip install '.[experiments]'   # in a checkout
kronblocks reproduce mlp       # the summary of this page; two trainings at a time, one thread each: two to three hours
kronblocks reproduce linear    # also: lenet5, vit-tiny, swin-tiny, ablation, search, or all
kronblocks reproduce tables    # this page
```

Other data, methods, block sizes, sparsities or seeds make a study of your own, which is tuned and compared in the same way:

```sh
kronblocks reproduce lenet5 --name mine --data fashion-mnist --methods two-phase rigl --block-sizes 8 16x4 --sparsities 0.8
```

What is done is not run again, so an interrupted command goes on where it was. The paper's own trainings of transformers, on
CIFAR-100 with images of 224 pixels, 100 epochs and three seeds, want a GPU, and have **not been run** here. Every method gets a
learning rate of its own there too, in whole trainings at 80% in 32x32 blocks, about a third of all:

```sh
kronblocks reproduce vit-tiny --full
kronblocks reproduce vit-base --full
kronblocks reproduce swin-tiny --full
```"""

_PLANNED_FOR_THE_BATCH = """

Multiply-adds of `two-phase`, `kron-l1`, `rigl` and `static` are those of plans chosen for 16 rows, the batch, although {rows}
rows reach most layers: tokens were left out. Plans are chosen for those rows now. Counted again without training (the same
schedule, masks by the first weights, 80% zeros, 16x16 blocks), training takes about
{counts} of dense's multiply-adds.
Accuracies depend on plans by their rounding only."""
_VIT_PLANS = _PLANNED_FOR_THE_BATCH.format(
    rows="1,040", counts="0.36 (`two-phase`), 0.86 (`kron-l1`), 0.27 (`rigl`) and 0.24 (`static`)"
)
_SWIN_PLANS = _PLANNED_FOR_THE_BATCH.format(
    rows="64 to 1,024", counts="0.34 (`two-phase`), 0.71 (`kron-l1`), 0.49 (`rigl`) and 0.47 (`static`)"
)

WHERE_BASELINES_WIN = {
    "mlp": """Where a baseline wins: at 50% with 16x16 blocks `magnitude`, clearly, and `rigl`, both by 0.19 points,
`iterative` by 0.13 and `static` by 0.05: half of the blocks carry the weight, and `two-phase` trains their free values
only from the lift on, after about a quarter of the training. At 90% with 2x2 and 8x8 blocks `kron-l1`, by 0.1 and 0.3
points, with intervals that include 0: it has more parameters than dense there (a rank of 64, tuned at 16x16, is all of a
block of 8x8, which makes it a dense layer with a penalty), at a rate that is up to eight times the others'. At 80% with
16x16 blocks `static` and `rigl` are level: random live blocks are enough there, and train from the first step; at 95%
they are not. `iterative` at 4x4 and `elastic-group-lasso` at 16x16 end pruning at a tenth of the training, the earliest
that may be tried: what has lost or shrunk its blocks wants time to recover. What would beat `magnitude` at 50% is an
earlier lift, or none: where half of the blocks live, factors save little.""",
    "linear-mnist5k": """Where baselines win: at 50% `magnitude`, `kron-l1` and `elastic-group-lasso`, by 0.1 to 0.2
points, with intervals that include 0. At 90% `kron-l1`, by 1.1 points, and both lassos, by 0.9 and 1.1 with intervals
that include 0, at eight and sixteen times the rate of `two-phase`. What does it is a penalty over half of the training
and more: in the trials at rate 0.016 with rank 4, `kron-l1` ends at 82.2% with a strength of 0.3, at 86.5% with 1 and at
87.9% with 3. Such a penalty while `two-phase` looks for its blocks was tried apart, on validation, five folds: it finds
better blocks (88.7% without a lift, level with `kron-l1`; `two-phase` as it is 87.2%), but after the lift free values fit
the 3,200 images too closely (88.4% at the most, less the higher their rate). Gradient times weight as the score, norms of
columns weighted by what reaches them, decay and regrowth gained less.""",
    "linear-fashion": """Where baselines win: at 50% `magnitude` and `elastic-group-lasso`, by up to 0.1 points, with
intervals that include 0. At 90% `kron-l1`, by 0.9 points, with more parameters than dense and for the reason given under
linear-mnist5k, `group-lasso` by 0.5, and `elastic-group-lasso` and `magnitude` by 0.2 to 0.4, with intervals that include
0. `static` takes the largest rate that may be tried, 0.512, by chance: it is worse at 50% with it.""",
    "vit-tiny-fashion": """Where baselines win: `kron-l1` by 11 points, and `static`, `rigl`, `iterative` and `magnitude` by 2
to 8, with intervals that include 0. All methods train at one learning rate here, untuned, for some 300 steps, after which
dense has only begun to learn (54%): what is compared is how fast each begins. vit-tiny-fashion-tuned has rates of their own
and 500 steps, and says what slows `two-phase` down."""
    + _VIT_PLANS,
    "vit-tiny-fashion-tuned": """Twice the images of vit-tiny-fashion, 500 steps instead of 315, and a learning rate of its own
for each method, found in three or four trials of one seed: the first grid has two rates here and no second setting. Where
baselines win: `kron-l1` by 13 points, `magnitude`, `iterative`, `static` and `rigl` by 5 to 9, with intervals that include 0, and
very wide ones: seeds of `two-phase` lie up to 21 points apart, those of dense 17. 500 steps from a random start teach this model
little (dense 63%), and what begins fast looks good. How fast, the scale of the first weights decides: the model's own have a
standard deviation of 0.02, and factors take that over, as all methods have it; when factors began with that of `nn.Linear`,
twice as large here, `two-phase` reached 70.1% and 64.9% in vit-tiny-fashion, ahead of dense. That was the start and not the
method, and on Swin-tiny, where blocks of all layers compete, it cost 2 to 4 points. Whoever wants such a start calls
`reset_parameters()` of the linear layers before `sparsify_`. How little one trial of one seed says here shows in
vit-tiny-factor-rates: with the next lower rate `two-phase` reaches 57.2% on the same seeds. What each method ends at is for the
trainings with 100 epochs to say, which have not been run."""
    + _VIT_PLANS,
    "swin-tiny-fashion-tuned": """Twice the images of swin-tiny-fashion and a learning rate of its own for each method, found in
three or four trials of one seed. `two-phase` is level with dense and with the best baselines (`rigl`, `iterative`, `static`,
`magnitude`, all within 0.6 points, with intervals that include 0) and ahead of `kron-l1` and the lassos by 1.4 to 1.5; at this
length of training random blocks are nearly as good as any. It trains for half of dense's multiply-adds, as `rigl` and `static`
do, and what it leaves alive costs half of theirs in inference: its blocks are chosen by norm over all layers, theirs are given to
layers by Erdos-Renyi. New factors begin with the variance of the weights in whose place they stand; with that of `nn.Linear`,
whose standard deviation is up to three times as large here, `two-phase` ended 3.6 points lower and left most of the last layers
alive. A rate of their own for factors gains nothing: see swin-tiny-factor-rates."""
    + _SWIN_PLANS,
    "swin-tiny-fashion": """`two-phase` is ahead of dense, the lassos and `kron-l1`; `iterative`, `magnitude`, `static` and `rigl`
are ahead of it by 0.03 to 0.23 points, with intervals of 2 to 3 points: a training of some 300 steps is too short to tell good
blocks from bad ones (random ones are as good as any). All methods train at one learning rate here, untuned;
swin-tiny-fashion-tuned has rates of their own. What `rigl` and `static` leave alive costs twice as much in inference as what the
others leave, at the same zeros: shares by Erdos-Renyi take more of the last layers, which few tokens reach. The last stage has
one token here, so its queries and keys get no gradient: blocks that `rigl` grows there stay zeros, which is why two of its seeds
have more zeros than was asked for."""
    + _SWIN_PLANS,
    "lenet5-mnist5k": """Where baselines win: at 50% all, by 0.3 to 0.6 points, of which only `kron-l1` and `rigl` clearly
(0.4): `two-phase` trains the free values of its linear layers from the lift on only, at settings that were tuned at 90%;
with so many blocks left to live, what begins with free values (`rigl`, `magnitude`) is the better choice. At 90%
`iterative` and `magnitude` are ahead by 0.2 points, with intervals that include 0; they train all weights until pruning
ends, at 0.4 of the training.""",
    "lenet5-fashion": """Where baselines win: at 50% `elastic-group-lasso`, `iterative` and `magnitude`, at 90% `iterative` and
both lassos, by 0.04 to 0.22 points, with intervals that include 0; they train all weights of the linear layers
until pruning ends. Nothing comes within 0.9 points of dense at 90%, though: the linear layers are left with some six thousand of
59 thousand weights behind convolutions of 2,572, and that is too few for this task, whichever blocks they are: see
lenet5-fashion-finer, where single weights do not do it either. Tried for `two-phase` on validation, one seed each, 10 to 30
epochs, and within half a point of it as it is: higher rank, rate or smaller batches, other moments of the lift and ends of
pruning, regrowth, gradient times weight as the score, shares of the layers by Erdos-Renyi or by LAMP (Lee et al. 2021),
features flattened the other way round, and a dense teacher (half a point better).""",
    "lenet5-fashion-finer": """What the size of blocks costs here, with twice the epochs. With blocks of one weight
`magnitude` prunes single weights, as freely as zeros can be chosen, and still loses 0.6 points to dense: a tenth of these
layers is too little, and being within 0.3 points, as on the MLP, is out of reach of any blocks. Blocks of 2x2 cost nothing
beyond that, blocks of 4x4 0.4 points. `two-phase` stays 0.2 points behind `magnitude`, which trains all weights until 70% of
the training; what would beat both is more weights: fewer zeros in these layers, or wider convolutions before them.""",
}
"""What the tables show against the default method, and why."""

DECIDED = """Few intervals leave 0 out: one bank of tiles and the staircase lose at 16x16, three times the rate for factors
at both sizes; two forms of the recipe as shipped gain at 16x16; the rest is within the noise of three seeds. So
the base stayed but for three settings: factors train at the rate of the dense weights (no worse, and further
from where it gets worse), pruning ends at 0.4 of the training (no worse, and cheaper), and the rank is a
quarter of a block's weights from 2 to 8 (the trials of the comparison of methods say the same: 8 at 16x16).
Regrowth changes nothing, so it is off; nor does decay, of factors or of values. Tiles that learn twice as fast
as coefficients do worse at 16x16, and half as fast no better than alike, so all factors have one rate. Rows
that begin with A combine several; those as shipped are the recipe with all that was chosen: level at 4x4 with
either rank, and 0.3 to 0.5 points better at 16x16, where rank 8, its own, was trained twice (0.38 and 0.47,
with other rounding) and gains over rank 4 what is within the noise."""

VARIED = {
    "ablation": (f"What the defaults of {OURS} were chosen by, one setting changed at a time", DECIDED),
    "group-lasso-forms": (
        "Group LASSO as a proximal step that keeps to the schedule, and as published, in the loss",
        """A step along the gradient makes no zeros, so in the loss all blocks that have to die are cut at once, at half of
the training. Blocks of 4x4 bear that, best with a large strength, which has shrunk them before. Blocks of 16x16
bear it at a strength of 10 only, 0.4 points behind the proximal step: with less, most trainings end far below
or at chance after one cut by one budget over all layers. The proximal step needs no strength to be found, and
is nowhere worse, which is why it is the default. Milder cuts, in stages or layer by layer, were not tried.""",
    ),
    "kron-l1-forms": (
        "The paper's L1 on S in the loss, with several strengths, and as a proximal step",
        """A strength of 1, the default, is best at 4x4, and at 16x16 none is clearly better. The proximal step costs 0.3 to 0.7
points and saves three fifths of the multiply-adds, since blocks die on the way.""",
    ),
    "swin-tiny-factor-rates": (
        f"Whether the factors of {OURS} want a higher rate on transformers, whose dense rates are some ten times lower than "
        "the MLP's",
        """They do not: at either of two dense rates four or sixteen times as much for factors is within the noise of three seeds.
The lower rate for all is what gains. So factors keep the dense rate."""
        + _SWIN_PLANS,
    ),
    "vit-tiny-factor-rates": (
        "The same in the trainings of vit-tiny-fashion-tuned",
        """Sixteen times the rate for factors ends 10 to 15 points lower than once, four times level at the higher of two dense
rates and 6 points higher at the lower one. Seeds of one setting lie up to 18 points apart, so none of it is clear."""
        + _VIT_PLANS,
    ),
}
"""What a study of variants is for, and what came of it."""
