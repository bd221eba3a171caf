"""What a verifier is, how one is found by its import path, and the processes that run it safely."""

import functools
import importlib
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, NamedTuple, Protocol, Self

from pebble import ProcessExpired, ProcessPool

from laser_pl.data.problem import Problem
from laser_pl.errors import UserError, one_line, suggestion
from laser_pl.reward.extract import last_boxed

MAX_BREAKS = 3


class Verdict(NamedTuple):
    """What a verifier says about a response.

    Attributes:
        reward: 0.0 or 1.0.
        answer: the extracted answer, None if there is none.
        error: "timeout", "crash" or an exception's message where verification failed and was scored
            0; None otherwise.
    """

    reward: float
    answer: str | None
    error: str | None = None


class Verifier(Protocol):
    """Anything called with a problem and a response that gives a Verdict, or a reward of 0 or 1.

    A verifier may also have `equivalent(a: str, b: str) -> bool`, for votes; without it two answers
    are the same if their texts are, white space around them aside.
    """

    def __call__(self, problem: Problem, response: str) -> Verdict | float:
        """Reward and answer of a response."""
        ...


def resolve_verifier(target: str, arguments: Mapping[str, Any]) -> Verifier:
    """Find a verifier by its import path; the current folder is searched too.

    Args:
        target: "package.module.Name" of a class, made with the arguments, or of a function of
            (problem, response), called with the arguments besides.
        arguments: by name; checked against the signature before anything is made.
    Returns:
        The verifier.
    Raises:
        UserError: no such module or name, not callable, unknown or missing arguments, or a class
            that refuses its arguments.
    """
    found = _import(target)
    if not callable(found):
        raise UserError(
            f"verifier._target_ = {target}: a {type(found).__name__}; must be a class or a function"
        )
    if not inspect.isclass(found):
        _check_arguments(target, found, (None, None), arguments)
        return functools.partial(found, **arguments)
    if "__call__" not in dir(found):
        raise UserError(
            f"verifier._target_ = {target}: its objects cannot be called; give the class a "
            "__call__(self, problem, response)"
        )
    _check_arguments(target, found, (), arguments)
    made: Any
    try:
        made = found(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"verifier.arguments: {target} refuses them: {one_line(error)}") from error
    verifier: Verifier = made
    return verifier


def _import(target: str) -> Any:
    """The object that an import path names."""
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise UserError(f"verifier._target_ = {target}: must be a path such as my_module.my_name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"verifier._target_ = {target}: module {module_name} cannot be imported: "
            f"{one_line(error)}"
        ) from error
    if not hasattr(module, name):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise UserError(
            f"verifier._target_ = {target}: {module_name} has no {name}{suggestion(name, names)}"
        )
    return getattr(module, name)


def _check_arguments(
    target: str, found: Callable[..., Any], given: tuple[Any, ...], arguments: Mapping[str, Any]
) -> None:
    """Bind the arguments to the signature, `given` standing for those that a call adds."""
    try:
        signature = inspect.signature(found)
    except ValueError:
        raise UserError(
            f"verifier._target_ = {target}: its signature is not known; wrap it in a function"
        ) from None
    try:
        signature.bind(*given, **arguments)
        return
    except TypeError as error:
        reason = str(error)
    names = list(signature.parameters)[len(given) :]
    takes = f"it takes {', '.join(names)}" if names else "it takes none"
    if given and len(signature.parameters) < len(given):
        raise UserError(
            f"verifier._target_ = {target}: must take (problem, response), takes {signature}"
        )
    for name in arguments:
        if name not in names:
            raise UserError(
                f"verifier.arguments.{name}: no such argument of {target}"
                f"{suggestion(name, names)}; {takes}"
            )
    raise UserError(f"verifier.arguments: {target}: {reason}; {takes}")


def answers_equivalent(verifier: Verifier, a: str, b: str) -> bool:
    """Whether two answers are the same to a verifier.

    Args:
        verifier: its `equivalent` decides, where it has one.
        a: an answer.
        b: another.
    Returns:
        True if they are equivalent, or if their stripped texts are equal.
    """
    if a.strip() == b.strip():
        return True
    equivalent = getattr(verifier, "equivalent", None)
    return equivalent is not None and bool(equivalent(a, b))


def canonical_answers(verifier: Verifier, answers: Sequence[str | None]) -> list[str | None]:
    """Make equivalent answers to one problem one string: the first of them.

    Args:
        verifier: decides which answers are equivalent.
        answers: [K] answers, None where a response has none.
    Returns:
        [K] answers. With a mathematical verifier ["1/2", None, "0.5"] becomes ["1/2", None, "1/2"].
    """
    representatives: dict[str, str] = {}
    for answer in answers:
        if answer is not None and answer not in representatives:
            known = dict.fromkeys(representatives.values())
            same = (other for other in known if answers_equivalent(verifier, other, answer))
            representatives[answer] = next(same, answer)
    return [None if answer is None else representatives[answer] for answer in answers]


class VerifierPool:
    """Runs a verifier over many responses, in processes that can be stopped.

    A verification that takes longer than `timeout_s` or ends its process is scored 0 with the error
    "timeout" or "crash", and counted; the others of the batch are not affected. The processes start
    at the first use and live until `close`; each has its own copy of the verifier.

    Args:
        verifier: what to run; must be picklable if there are processes.
        timeout_s: seconds for one verification, or for comparing the answers to one problem.
        num_workers: processes; 0 runs the verifier in this process, where nothing can stop it.
        on_error: what an exception in the verifier, or a reward that is not 0 or 1, does: "stop"
            raises a UserError, "zero" scores 0 and counts.
    Attributes:
        num_timeouts: verifications and comparisons cut off so far.
        num_crashes: those whose process died.
        num_errors: those that raised, or gave back a verdict with an error.
    Raises:
        UserError: the verifier cannot be sent to a process.
    """

    def __init__(
        self,
        verifier: Verifier,
        timeout_s: float,
        num_workers: int,
        on_error: Literal["stop", "zero"],
    ) -> None:
        self.verifier = verifier
        self.timeout_s = timeout_s
        self.num_workers = num_workers
        self.on_error = on_error
        self.num_timeouts = 0
        self.num_crashes = 0
        self.num_errors = 0
        self._processes: ProcessPool | None = None
        self._pending: set[Future[Any]] = set()
        if num_workers > 0:
            self._pickled = _pickle(verifier)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def counts(self) -> dict[str, int]:
        """The three counts by name."""
        return {
            "num_timeouts": self.num_timeouts,
            "num_crashes": self.num_crashes,
            "num_errors": self.num_errors,
        }

    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """Verify responses.

        Args:
            problems: [N] the problem that each response answers.
            responses: [N] texts.
        Returns:
            [N] verdicts, in order. For a verifier that gives only a reward the answer is the
            last box.
        Raises:
            UserError: the verifier raised, and on_error is "stop".
            ValueError: problems and responses differ in number.
        """
        pairs = list(zip(problems, responses, strict=True))
        results = self._run(_verdict, pairs)
        verdicts = []
        for problem, result in zip(problems, results, strict=True):
            if isinstance(result, _Failure):
                self._record(result, f"problem {problem.index}")
                result = Verdict(0.0, None, result.message)
            elif result.error is not None:
                self.num_errors += 1
            verdicts.append(result)
        return verdicts

    def canonical_answers(self, groups: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
        """Make equivalent answers one string, problem by problem, as `canonical_answers` does.

        Args:
            groups: [M][K] the answers to each of M problems.
        Returns:
            [M][K] answers. Where comparing takes too long or fails, which is counted, answers are
            the same if their texts are.
        Raises:
            UserError: the verifier's `equivalent` raised, and on_error is "stop".
        """
        if not hasattr(self.verifier, "equivalent"):
            return [canonical_answers(_by_text, group) for group in groups]
        results = self._run(_canonical, [(list(group),) for group in groups])
        answers = []
        for index, (group, result) in enumerate(zip(groups, results, strict=True)):
            if isinstance(result, _Failure):
                self._record(result, f"equivalent, answers to problem {index}")
                result = canonical_answers(_by_text, group)
            answers.append(result)
        return answers

    def cancel(self) -> None:
        """Give up what is being verified: whoever waits for it in another thread, and alone may
        use the pool until then, gets a CancelledError."""
        for future in list(self._pending):
            future.cancel()

    def close(self) -> None:
        """Stop the processes; a later call starts new ones."""
        if self._processes is not None:
            self._processes.stop()
            self._processes.join()
            self._processes = None

    def _record(self, failure: "_Failure", what: str) -> None:
        if failure.kind == "timeout":
            self.num_timeouts += 1
        elif failure.kind == "crash":
            self.num_crashes += 1
        elif self.on_error == "stop":
            raise UserError(
                f"verifier: {what}: {failure.message}; verifier.on_error=zero would go on"
            )
        else:
            self.num_errors += 1

    def _run(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The result or the _Failure of `function(verifier, *call)` for each call, in order."""
        if self.num_workers == 0:
            return [_attempt(function, self.verifier, call) for call in calls]
        results: dict[int, Any] = {}
        breaks = 0  # in a row, none of them with a result
        while breaks < MAX_BREAKS:
            missing = [index for index in range(len(calls)) if index not in results]
            self._run_in_processes(function, calls, missing, results)
            if len(results) == len(calls):
                return [results[index] for index in range(len(calls))]
            self.close()
            breaks = breaks + 1 if len(results) == len(calls) - len(missing) else 0
        raise UserError(
            "verifier: its processes die as they start; try verifier.num_workers=0 to see why"
        )

    def _run_in_processes(
        self,
        function: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        indices: Sequence[int],
        results: dict[int, Any],
    ) -> None:
        """Fill in results; those that a breaking pool took with it stay missing."""
        processes = self._started()
        futures: dict[int, Future[Any]] = {}
        try:
            for index in indices:
                arguments = (function, calls[index])
                futures[index] = processes.schedule(_work, arguments, timeout=self.timeout_s)
                self._pending.add(futures[index])
            for index, future in futures.items():
                results[index] = _outcome(future)
        except (BrokenProcessPool, RuntimeError):
            # A process died between two tasks, or before the pool knew which task it had taken.
            return
        except BaseException:
            # Ctrl-C above all: nobody waits for the rest any more.
            for future in futures.values():
                future.cancel()
            raise
        finally:
            self._pending.difference_update(futures.values())

    def _started(self) -> ProcessPool:
        if self._processes is None:
            self._processes = ProcessPool(
                max_workers=self.num_workers,
                initializer=_start_worker,
                initargs=(self._pickled,),
                context=_process_context(self.verifier),
            )
        return self._processes


class _Failure(NamedTuple):
    kind: Literal["timeout", "crash", "error"]
    message: str


def _outcome(future: "Future[Any]") -> Any:
    """The result of a task, or how it failed."""
    try:
        return future.result()
    except TimeoutError:
        return _Failure("timeout", "timeout")
    except ProcessExpired:
        return _Failure("crash", "crash")
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        return _Failure("error", f"cannot be sent to a process: {one_line(error)}")


def _attempt(function: Callable[..., Any], verifier: Verifier, call: tuple[Any, ...]) -> Any:
    try:
        return function(verifier, *call)
    except (Exception, SystemExit) as error:
        return _Failure("error", one_line(error))


def _verdict(verifier: Verifier, problem: Problem, response: str) -> Verdict:
    """Call the verifier and check what it gives back."""
    result = verifier(problem, response)
    if isinstance(result, Verdict):
        reward, answer, error = result
    else:
        reward, answer, error = result, last_boxed(response), None
    try:
        is_reward = float(reward) in (0.0, 1.0)
    except (TypeError, ValueError):
        is_reward = False
    if not is_reward:
        raise ValueError(f"the verifier gave the reward {reward!r}; rewards must be 0 or 1")
    return Verdict(float(reward), None if answer is None else str(answer), error)


def _canonical(verifier: Verifier, answers: Sequence[str | None]) -> list[str | None]:
    return canonical_answers(verifier, answers)


def _by_text(problem: Problem, response: str) -> float:
    """Stands for a verifier without `equivalent`."""
    raise NotImplementedError


def _pickle(verifier: Verifier) -> bytes:
    try:
        pickled = pickle.dumps(verifier)
        pickle.loads(pickled)
    except Exception as error:
        raise UserError(
            f"verifier: cannot be sent to another process: {one_line(error)}; use "
            "verifier.num_workers=0"
        ) from error
    return pickled


def _process_context(verifier: Verifier) -> multiprocessing.context.BaseContext:
    """How processes start: never by forking this one, whose torch threads a fork would break."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports our verifiers once, so that a new process after a timeout is there at once.
    # Not a user's: a module that starts threads would break there.
    module = type(verifier).__module__
    if module.startswith("laser_pl."):
        context.set_forkserver_preload([module])
    return context


_worker_verifier: Verifier


def _start_worker(pickled: bytes) -> None:
    """Set up a process: Ctrl-C is the main process's business."""
    global _worker_verifier
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_verifier = pickle.loads(pickled)


def _work(function: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    return _attempt(function, _worker_verifier, call)
