import gzip
import json

import pytest

from retention_bench.errors import RetentionBenchError
from retention_bench.pipeline.rows import Texts


def test_texts_can_be_gone_through_again(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": f"text {i}"}) + "\n" for i in range(5))
    texts = Texts(str(path), None, None, 3)
    assert list(texts) == list(texts) == ["text 0", "text 1", "text 2"]
    assert len(list(Texts(str(path), None, None, 9))) == 5


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        ("", "holds no rows"),
        ('{"text": "a"}\n{"text": " "}\n', "row 2: a corpus row needs a `text`"),
        ('{"text": "a"}\n["b"]\n', "row 2: a corpus row needs"),
        ('{"text": "a"}\n{"te', "line 2: not JSON"),
    ],
)
def test_a_corpus_that_is_not_well_formed_is_refused(tmp_path, contents, why):
    path = tmp_path / "c.jsonl"
    path.write_text(contents)
    with pytest.raises(RetentionBenchError, match=why):
        list(Texts(str(path), None, None, 9))
