"""Every command with wrong input: exit code 2, and one line that names what was passed and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from learnedopt import cli
from learnedopt.core.sealed import write_record

SWEEP = Path(__file__).resolve().parent.parent / "sweeps" / "lstm-quadratic.yaml"
NONSENSE = {
    # command line, with a word that is like none; what says which there are
    "train xyzzy": "learnedopt train --list",
    "train demo --xyzzy 1": "learnedopt train --help",
    "train demo xyzzy=1": "; there are name, family, ",
    "train demo estimator=xyzzy": "none of Unrolled, Truncated, ",
    "train demo estimator.tape=xyzzy": "none of NONE, FIRST_ORDER, FULL",
    "train demo family=xyzzy": "All task families: quadratic, ",
    "train demo meta.optimizer=xyzzy": "(known: adam, ",
    "train demo meta.optimizer.xyzzy=1": "; there are lr, ",
    "train demo --wandb xyzzy": "none of online, offline, disabled ",
    "card xyzzy": "the packaged optimizers ",
    "xyzzy": "learnedopt --help",
}
WRONG = [
    # command line; what its one line names of it, and what it says to do
    ("", "COMMAND", "--help"),
    ("evalute", "'evalute'", "did you mean evaluate?"),
    ("trian demo", "'trian'", "did you mean train?"),
    ("--verison", "--verison", "did you mean --version?"),
    ("list --al", "--al", "learnedopt list --help"),
    ("list rules", "rules", "learnedopt list --help"),
    ("card", "NAME", "required"),
    ("card generol", "'generol'", "did you mean 'general'?"),
    ("card no/such/run", "no/such/run", "packaged"),
    ("train", "recipe", "learnedopt train --list shows all"),
    ("train demmo", "'demmo'", "did you mean 'demo'?"),
    ("train demo --sets seed=1", "--sets", "did you mean --set?"),
    ("train demo --wandb of", "'of'", "offline"),
    ("train demo --timeout soon", "'soon'", "float"),
    ("train demo --name a/b", "a/b", "--name"),
    ("train demo --set", "--set", "argument"),
    ("train demo --set seed", "'seed'", "key=value"),
    ("train demo --set sede=1", "'sede'", "did you mean 'seed'?"),
    ("train demo --set seed=one", "seed='one'", "int"),
    ("train demo --set seed=-1", "seed=-1", "not a count"),
    ("train demo --sede=1", "--sede=1", "did you mean --seed"),
    ("train demo --meta.rl 1", "'meta.rl'", "did you mean 'lr'?"),
    ("train demo meta.rl=1", "'meta.rl'", "did you mean 'lr'?"),
    ("train demo --meta.lr", "--meta.lr", "expected one argument"),
    ("train demo --config no.yaml", "no.yaml", "cannot be read"),
    ("train demo --extend=yes", "--extend", "'yes'"),
    ("train demo --import tests.py", "tests.py", "did you mean 'tests'?"),
    ("train demo --log-every 0", "log_every=0", "not a count"),
    ("train demo --import no_such_module", "no_such_module", "there is no module"),
    ("train demo --set meta.rl=1", "'meta.rl'", "did you mean 'lr'?"),
    ("train demo --set meta.lr=0", "lr=0.0", "must be positive"),
    ("train demo --set meta.lr.x=0", "'meta.lr.x'", "no fields"),
    ("train demo --set meta.optimizer=adan", "'adan'", "'adam'?"),
    ("train demo --set estimator=Unroled", "'Unroled'", "did you mean 'Unrolled'?"),
    ("train demo --set estimator.num_step=3", "'estimator.num_step'", "did you mean 'num_steps'?"),
    ("train demo --set estimator.tape=FUL", "'FUL'", "did you mean 'FULL'?"),
    ("train demo --set family=quadratik", "'quadratik'", "did you mean 'quadratic'?"),
    ("train demo --set family.dimm=3", "'dimm'", "did you mean 'dim'?"),
    ("train demo --set rule=null", "rule='null'", "needs a name"),
    ("train demo --set execution.device=gpu", "'gpu'", "execution.device"),
    ("train optimistic-convex --set problems=()", "problems", "name one"),
    ("train demo execution.compile=maybe", "'maybe'", "none of true, false, step"),
    ("train demo meta=3", "meta='3'", "such as meta.lr"),
    ("train demo meta.lr=nan", "meta.lr='nan'", "not finite"),
    ("train demo num_meta_steps=1e3", "num_meta_steps='1e3'", "write 1000"),
    ("train demo --runs /dev/null", "/dev/null/demo cannot be", "name another place"),
    ("report runs/mine --out /dev/null/page.html", "/dev/null cannot be", "name another place"),
    ("train demo num_threads=0 --smoke", "num_threads=0", "not a count"),
    ("train bmg-quadratic num_threads=0", "num_threads=0", "not a count"),
    ("train demo --smoke estimator.num_steps=50", "estimator.horizon=10", "--smoke has shrunk"),
    ("train demo estimator.num_steps=-3", "estimator.num_steps=-3", "not a count"),
    ("train demo validation.every=0", "validation.every=0", "not a count"),
    ("train demo family.dim=0", "family.dim=0", "not a count"),
    ("train demo rule.hidden_size=0", "rule.hidden_size=0", "must be at least 1"),
    ("train demo --backend foo", "'foo'", "pass --backend gloo"),
    ("train bmg-quadratic --extend num_meta_steps=3", "bmg-quadratic is a study", "leave it out"),
    ("check demmo", "'demmo'", "did you mean 'demo'?"),
    ("check optimistic-convex", "optimistic-convex", "check a recipe of one meta-training"),
    ("check demo --theta x", "--theta", "--help"),
    ("diagnose optimistic-convex", "optimistic-convex", "diagnose a recipe of one meta-training"),
    ("diagnose demo --memory-limit -3", "--memory-limit -3", "positive"),
    ("diagnose demo --truth-dtype float16", "'float16'", "float64"),
    ("diagnose demo --theta no/such/run", "no/such/run", "packaged"),
    ("evaluate", "CHECKPOINT", "required"),
    ("evaluate generol --family quadratic", "'generol'", "did you mean 'general'?"),
    ("evaluate general --family quadratik", "'quadratik'", "did you mean 'quadratic'?"),
    ("evaluate general --family quadratic --set dimm=3", "'dimm'", "did you mean 'dim'?"),
    ("evaluate general --family quadratic --set dim", "'dim'", "KEY=VALUE"),
    ("evaluate general --family quadratic --step 3", "--step", "did you mean --steps?"),
    ("evaluate general --family quadratic --steps few", "'few'", "int"),
    ("evaluate general --family quadratic --steps 0", "num_steps=0", "not a count"),
    ("evaluate general --family quadratic --tune-for loss", "'loss'", "final_loss"),
    ("evaluate general --family quadratic --baselines Adan", "Adan", "did you mean 'Adam'?"),
    ("evaluate general --family quadratic --nets 1", "--nets has no effect", "leave it out"),
    ("evaluate general --family quadratic --import no_such_module", "no_such_module", "there is no module"),
    ("evaluate general general --few-shot", "general general", "named twice"),
    ("evaluate general --suite unseeen", "'unseeen'", "did you mean 'unseen'?"),
    ("evaluate runs/min", "min'", "did you mean 'runs/mine'?"),
    ("evaluate runs/study", "study'", "a study leaves none"),
    ("evaluate runs/mine/theta.json", "theta.json", "did you mean runs/mine/theta.safetensors?"),
    ("evaluate general --suite unseen --nets gru", "'gru'", "by number: "),
    ("evaluate general --suite unseen --tune-for last_tem", "'last_tem'", "did you mean 'last_ten'?"),
    ("evaluate general --family quadratic --tune-for final", "'final'", "did you mean 'final_loss'?"),
    ("evaluate general --suite unseen --few-shot", "--suite and --few-shot", "leave one out"),
    ("evaluate general --suite unseen --device foo", "--device 'foo'", "cannot be used here"),
    ("evaluate general --family quadratic --threads 0", "--threads=0", "not a count"),
    ("evaluate general --suite unseen --graphs some", "'some'", "baselines"),
    ("compare", "CHECKPOINT", "required"),
    ("compare lstm-mnist --steps 0", "num_steps=0", "not a count"),
    ("compare general --few-shot", "--few-shot", "learnedopt compare --help"),
    ("compare general --family quadratik", "'quadratik'", "did you mean 'quadratic'?"),
    ("compare general --wandb ofline", "'ofline'", "did you mean 'offline'?"),
    ("compare general --log-every 5", "--log-every", "learnedopt compare --help"),
    ("compare general --projekt mine", "--projekt", "did you mean --project?"),
    ("evaluate general --tensorboard=yes", "--tensorboard", "'yes'"),
    ("report", "RUN", "required"),
    ("report no/such/run", "no/such/run", "name that of a run"),
    ("report .", ".", "config.json"),
    ("sweep", "FILE", "required"),
    ("sweep no.yaml", "'no.yaml'", "name a sweep"),
    ("sweep .", "'.'", "name a sweep"),
    ("sweep SWEEP --process 2", "--process", "did you mean --processes?"),
    ("sweep SWEEP --processes two", "--processes='two'", "int"),
    ("sweep SWEEP --processes 0", "processes=0", "not a count"),
    ("sweep SWEEP --trials 0", "trials=0", "not a count"),
    ("sweep SWEEP --wandb offline", "--wandb", "learnedopt sweep --help"),
    ("swep SWEEP", "'swep'", "did you mean sweep?"),
    ("hub", "'hub'", "did you mean hub push or hub pull?"),
    ("hub psh", "'hub psh'", "did you mean hub push?"),
    ("hub push general", "--to", "required"),
    ("hub push generol --to ./here", "'generol'", "did you mean 'general'?"),
    ("hub pull ./nothing --as x", "nothing", "learnedopt hub push"),
    ("hub pull ./nothing", "--as", "required"),
    ("evaluate lstm-quadratic --few-shot --tasks 2 --out /dev/null", "/dev/null", "exists"),  # said before the work
]


@pytest.mark.parametrize(("line", "passed", "told"), WRONG, ids=[line or "nothing" for line, *_ in WRONG])
def test_wrong_input_ends_in_one_line_that_names_it_and_what_to_do(
    line: str,
    passed: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for run in ("mine", "study"):
        write_record(tmp_path / "runs" / run / "config.json", {"recipe": {}})
    for name in ("theta.json", "theta.safetensors"):
        (tmp_path / "runs" / "mine" / name).write_text("no theta")
    assert cli.main(line.replace("SWEEP", str(SWEEP)).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("learnedopt") and err.endswith("\n"), err
    assert passed in err and told in err, err


@pytest.mark.parametrize(("line", "told"), NONSENSE.items(), ids=NONSENSE.keys())
def test_a_word_that_is_like_none_gets_no_hint_but_what_there_is(
    line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'xyzzy'" in err.replace("--xyzzy", "'xyzzy'"), err
    assert told in err and "did you mean" not in err, err
