"""The quickstart's reward: how positive a response sounds, minus a penalty if it was cut off."""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], responses: list[str], *, finished: list[bool], cut_off_penalty: float) -> list[float]:
    """VADER's compound score, from -1 (negative) to 1 (positive), minus `cut_off_penalty` for an unfinished response.

    VADER is a lexicon that rates the mood of words (Hutto and Gilbert, ICWSM 2014), so anyone can check a score by
    reading the response.
    """
    return [
        _analyzer().polarity_scores(response)["compound"] - (0.0 if is_finished else cut_off_penalty)
        for response, is_finished in zip(responses, finished, strict=True)
    ]
