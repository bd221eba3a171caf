"""Answers to reasoning_gym problems, scored by the dataset that made them."""

from functools import lru_cache
from json import dumps, loads

from reasoning_gym.dataset import ProceduralDataset

from laser_pl.data.problem import Problem
from laser_pl.data.reasoning_gym_tasks import create_task
from laser_pl.errors import one_line
from laser_pl.reward.extract import last_boxed, last_line, last_tagged
from laser_pl.reward.verifier import Verdict


class ReasoningGymVerifier:
    r"""Reward 1 if the dataset's own scorer gives the answer its full score.

    The answer is the last `\boxed{}`, else the last `<answer>...</answer>`, else the last line that
    is not blank.

    A verdict is as good as the scorer: that of `game_of_life_halting` (reasoning_gym 0.1.25) takes
    any text for a right answer.
    """

    def __call__(self, problem: Problem, response: str) -> Verdict:
        """Reward and answer of a response.

        Args:
            problem: made by `load_reasoning_gym`.
            response: what the model wrote.
        Returns:
            The verdict. Some scorers raise on malformed answers: that is reward 0, with the error.
        Raises:
            ValueError: the problem is not from reasoning_gym.
        """
        try:
            name, entry = problem.metadata["dataset"], problem.metadata["entry"]
        except KeyError:
            raise ValueError(
                "not a reasoning_gym problem; use data=reasoning_gym, or another verifier"
            ) from None
        answer = last_boxed(response) or last_tagged(response) or last_line(response)
        if answer is None:
            return Verdict(0.0, None)
        task = _task(name, dumps(problem.metadata["params"], sort_keys=True, default=list))
        try:
            score = task.score_answer(answer, entry)
        except Exception as error:
            return Verdict(0.0, answer, f"scorer of {name}: {one_line(error)}")
        return Verdict(float(score >= 1.0), answer)


@lru_cache(maxsize=32)
def _task(name: str, params: str) -> ProceduralDataset:
    """The dataset as a scorer: some scorers look at their dataset's parameters."""
    return create_task(name, loads(params), size=1, seed=0)
