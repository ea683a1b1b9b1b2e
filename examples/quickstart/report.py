"""Show what a run changed: a table of held-out scores before and after training, and a plot of the rewards.

python examples/quickstart/report.py runs/quickstart-...
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

BEFORE, AFTER, KEPT = "#8c8c8c", "#1f77b4", "#ff7f0e"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's log directory")
    run = parser.parse_args().run
    train, heldout = read_rollouts(run, "train"), read_rollouts(run, "val")
    before, after = (heldout[heldout.step == step] for step in (heldout.step.min(), heldout.step.max()))
    print(table(before, after))
    picture = run / "rewards.png"
    draw(train, before, after, picture)
    print(f"\nall rollouts, scored  {run / 'rollouts'}/*.jsonl")
    print(f"reward curve          {picture}")
    print(f"TensorBoard logs      {run}   (tensorboard --logdir {run})")
    trained = next((run / "checkpoints").glob("*.nemo"))
    print(f"trained model         {trained}")
    print("as a Hugging Face one  python examples/nlp/gpt/convert_nemo_to_hf.py", end=" ")
    print(f"--input {trained} --output {run / 'hugging_face'}")


def read_rollouts(run: Path, split: str) -> pd.DataFrame:
    """The rollouts of one split from all replicas. A step that was repeated after a kill counts once."""
    paths = sorted((run / "rollouts").glob(f"{split}_rank*.jsonl"))
    return pd.concat(pd.read_json(path, lines=True) for path in paths).drop_duplicates()


def table(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Reward with its standard error, response length and share of finished responses, before and after."""
    difference = after.reward.mean() - before.reward.mean()
    standard_error = (before.reward.sem() ** 2 + after.reward.sem() ** 2) ** 0.5
    rows = [
        f"{len(after)} held-out prompts         before           after",
        f"reward                 {_mean(before.reward)}  {_mean(after.reward)}",
        f"response length        {before.num_tokens.mean():6.1f} tokens    {after.num_tokens.mean():6.1f} tokens",
        f"finished responses     {before.finished.mean():6.0%}           {after.finished.mean():6.0%}",
        f"\nreward gained: {difference:+.3f}, {difference / standard_error:.1f} standard errors of the difference",
    ]
    return "\n".join(rows)


def _mean(rewards: pd.Series) -> str:
    return f"{rewards.mean():+6.3f} ± {rewards.sem():.3f}"


def draw(train: pd.DataFrame, before: pd.DataFrame, after: pd.DataFrame, path: Path) -> None:
    figure, (curve, histogram) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_step = train.groupby("step").reward.mean()
    kept_by_step = train[train.kept].groupby("step").reward.mean()
    curve.plot(by_step.index, by_step, marker="o", color=AFTER, label="all rollouts")
    curve.plot(kept_by_step.index, kept_by_step, marker="o", color=KEPT, label="kept for training")
    heldout = pd.concat([before, after]).groupby("step").reward
    curve.errorbar(
        heldout.mean().index,
        heldout.mean(),
        heldout.sem(),
        fmt="s",
        color="black",
        capsize=4,
        label="held out (± s.e.)",
    )
    curve.set(xlabel="rejection-sampling step", ylabel="mean reward", title="Reward while training")
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.legend(frameon=False)
    bins = [-1.5 + 0.125 * i for i in range(21)]
    histogram.hist(before.reward, bins, color=BEFORE, alpha=0.75, label=f"before, mean {before.reward.mean():+.2f}")
    histogram.hist(after.reward, bins, color=AFTER, alpha=0.6, label=f"after, mean {after.reward.mean():+.2f}")
    histogram.set(xlabel="reward of a held-out response", ylabel="responses", title="Held-out scores")
    histogram.legend(frameon=False, loc="upper left")
    for axes in (curve, histogram):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
