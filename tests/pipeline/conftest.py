import pytest
import yaml

from retention_bench.pipeline.suite import PACKAGED


@pytest.fixture(scope="session")
def small_suite(tmp_path_factory):
    """The atlas suite cut down to a few facts, steps and texts, with two edited models: real, but quick."""
    suite = yaml.safe_load((PACKAGED / "atlas.yaml").read_text())
    suite["facts"] |= {"edited": 6, "intrinsic": 12}
    suite["covariance"] |= {"texts": 200}
    for model in suite["models"].values():
        model["path"] = str((PACKAGED / model["path"]).resolve())
        model["editors"]["alphaedit"] |= {"edits_per_model": 3, "v_num_grad_steps": 8}
        for name in ("ft", "lora"):
            model["editors"][name] |= {"edits_per_model": 3, "num_steps": 5}
        model["finetunes"]["tulu3"] |= {
            "source": str((PACKAGED / model["finetunes"]["tulu3"]["source"]).resolve()),
            "train_size": 96,
            "validation_size": 16,
            "batch_size": 16,
            "max_steps": 6,
            "eval_every": 3,
        }
    for part in ("facts", "covariance"):
        suite[part]["source"] = str((PACKAGED / suite[part]["source"]).resolve())
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path
