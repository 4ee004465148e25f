"""Lists of videos as other projects write them: read as they are meant, or refused in one sentence."""

import json

import pytest

from mvd.config import DATASETS, ConfigError
from mvd.data.prepare.annotation_lists import read_list
from mvd.data.prepare.class_numbers import known_classes, number_classes

KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
"massaging person's head",aB-_x,5,15,train,0
abseiling,Zz12,0.0,10.0,train,1
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "list.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def indices(*files, labels=None, dataset=None) -> list[int]:
    """The class index of every line of some lists."""
    lists = [read_list(file) for file in files]
    numbers = number_classes(lists, labels, dataset).by_label
    return [numbers[item.label if item.label is not None else item.folder] for listed in lists for item in listed]


PLAIN = [("a/x y.mp4", 2), ("b,c.AVI", 0), ("d.m2ts", 10), ("e.mp4", 1)]


@pytest.mark.parametrize("header", ["", "path{}label\n", "video_name{}class\n"])
@pytest.mark.parametrize("delimiter", [" ", "\t", ",", ";", ", "])
def test_any_delimiter_with_or_without_a_header(write, delimiter, header):
    quoted = [f'"{path}"' if delimiter.strip() == "," else path for path, _ in PLAIN]
    lines = [f"{path}{delimiter}{label}\n" for path, (_, label) in zip(quoted, PLAIN, strict=True)]
    listed = read_list(write(header.format(delimiter) + "".join(lines)))
    assert [(item.path, item.label) for item in listed] == [(path, str(label)) for path, label in PLAIN]


def test_numbers_stay_numbers_below_a_header(write):
    assert indices(write("path label\n" + "".join(f"{n:02}.mp4 {n}\n" for n in range(12)))) == [*range(12)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_mark(write, encoding):
    listed = read_list(write("café.mp4 0\r\nzumba.mp4 1\r\n".encode(encoding)))
    assert [(item.path, item.label) for item in listed] == [("café.mp4", "0"), ("zumba.mp4", "1")]
    kinetics = read_list(write(KINETICS.encode(encoding)))
    assert [item.label for item in kinetics] == ["massaging person's head", "abseiling"]
    something = read_list(write('[{"id": 7, "template": "Closing [something]"}]'.encode(encoding), "a.json"))
    assert something[0].names == ("7",) and something[0].label == "Closing something"


def test_names_with_spaces_as_labels(write):
    listed = read_list(write("a b.mp4 riding a bike\nc.mp4 zumba\n"))
    assert [(item.path, item.label) for item in listed] == [("a b.mp4", "riding a bike"), ("c.mp4", "zumba")]
    assert indices(write("x.mp4,zebra, striped\ny.mp4,ant, red\n".replace(", ", " "))) == [1, 0]


def test_columns_are_found_by_their_names(write):
    for text in (
        "label,frames,path\n3,100,a.mp4\n0,90,b.mp4\n",
        "id,path,label\n7,a.mp4,3\n8,b.mp4,0\n",
        "path,label,notes\na.mp4,3,x\nb.mp4,0\n",
        "path,label\na.mp4,3,\nb.mp4,0,\n",
    ):
        listed = read_list(write(text))
        assert [(item.path, item.label) for item in listed] == [("a.mp4", "3"), ("b.mp4", "0")]


def test_a_path_may_begin_with_a_bracket(write):
    listed = read_list(write("[Show] ep 1.mp4 0\n[Show] ep 2.mp4 1\n"))
    assert [(item.path, item.label) for item in listed] == [("[Show] ep 1.mp4", "0"), ("[Show] ep 2.mp4", "1")]


@pytest.mark.parametrize("text", ["a/x.mp4 100 3\nb/y.mp4 90 0\n", "a/x 100 3\nb/y 90 0\n", "a/x,100,3\nb/y,90,0\n"])
def test_mmactions_three_columns(write, text):
    listed = read_list(write(text))
    assert [item.label for item in listed] == ["3", "0"]
    assert [item.path.removesuffix(".mp4") for item in listed] == ["a/x", "b/y"]


UCF_TRAIN = "B/v_B_g08.avi 1\r\nBa/v_Ba_g08.avi 2\r\nA/v_A_g09.avi 3\r\n"
UCF_TEST = "B/v_B_g01.avi\r\nA/v_A_g02.avi\r\n"


def test_ucf101_counts_from_one_and_its_test_list_has_no_labels(write):
    train, test = write(UCF_TRAIN, "trainlist01.txt"), write(UCF_TEST, "testlist01.txt")
    assert indices(train, test) == [0, 1, 2, 0, 2]
    numbering = number_classes([read_list(train)], None, None)
    assert numbering.names == {"B": 0, "Ba": 1, "A": 2} and "labels run from 1 to 3" in numbering.note
    classes = write("1 B\r\n2 Ba\r\n3 A\r\n4 Zoo\r\n", "classInd.txt")
    assert indices(train, test, labels=classes) == [0, 1, 2, 0, 2]
    assert indices(test, labels=classes) == [0, 2]


def test_kinetics_json(write):
    item = {"annotations": {"label": "zumba", "segment": [5.0, 15.0]}, "subset": "train", "duration": 10.0}
    (listed,) = read_list(write(json.dumps({"-3B32lodo2M": item}), "train.json"))
    assert listed.names == ("-3B32lodo2M_000005_000015", "-3B32lodo2M") and listed.label == "zumba"


def test_a_part_of_a_known_data_set_has_its_indices(write):
    assert indices(write(KINETICS), dataset="k400") == [known_classes("k400")["massaging person's head"], 0]
    items = [
        {"id": 1, "template": "Wiping [something] off of [something]"},
        {"id": 2, "template": "Closing [something]"},
    ]
    something = write(json.dumps(items), "train.json")
    assert indices(something, dataset="ssv2") == [173, 5]
    labels = write(json.dumps({name: str(index) for name, index in known_classes("ssv2").items()}), "labels.json")
    assert indices(something, labels=labels, dataset="ssv2") == [173, 5]
    assert indices(write("a.mp4 399\nb.mp4 7\n"), dataset="k400") == [399, 7]


def test_the_known_classes_are_those_of_other_programs():
    from torchvision.models._meta import _KINETICS400_CATEGORIES

    assert [*known_classes("k400")] == _KINETICS400_CATEGORIES == sorted(known_classes("k400"))
    assert len(known_classes("ssv2")) == 174 and [*known_classes("ssv2")] == sorted(known_classes("ssv2"))
    assert known_classes("a new data set") is None


@pytest.mark.parametrize(("dataset", "classes"), [("ucf101", 101), ("hmdb51", 51)])
def test_the_three_splits_have_the_same_classes(dataset, classes):
    names = known_classes(dataset)
    assert [*names] == sorted(names, key=str.casefold) and len(names) == DATASETS[dataset].classes == classes
    assert names == known_classes(f"{dataset}_split2") == known_classes(f"{dataset}_split3")


def test_ucf101s_own_lists_need_no_labels_file(write):
    train = write("Archery/v_Archery_g08_c01.avi 3\r\nYoYo/v_YoYo_g08_c01.avi 101\r\n", "trainlist02.txt")
    test = write("YoYo/v_YoYo_g01_c01.avi\r\nArchery/v_Archery_g01_c01.avi\r\n", "testlist02.txt")
    assert indices(train, test, dataset="ucf101_split2") == [2, 100, 100, 2]


def test_labels_files(write):
    names = write("a.mp4 zebra\nb.mp4 ant\n")
    for text in ('{"ant": "0", "bee": 1, "zebra": 2}', "0 ant\n1 bee\n2 zebra\n", "ant\nbee\nzebra\n"):
        assert indices(names, labels=write(text, "labels")) == [2, 0]
    with pytest.raises(ConfigError, match=r"labels has no class 'zebra' \(nearest"):
        indices(names, labels=write("ant\nbee\n", "labels"))
    with pytest.raises(ConfigError, match="the numbers of the 2 classes must be 0, 1, 2"):
        indices(names, labels=write('{"ant": 0, "zebra": 2}', "labels"))
    with pytest.raises(ConfigError, match="cannot be read as class name -> number"):
        indices(names, labels=write('{"ant": "x"}', "labels"))
    with pytest.raises(ConfigError, match="there is no labels file"):
        indices(names, labels=names.parent / "none")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lists no videos"),
        ("path label\n", "lists no videos"),
        ("[]", "lists no videos"),
        ("{}", "lists no videos"),
        ("label,youtube_id,time_start,time_end\n", "lists no videos"),
        ("a.mp4,\nb.mp4,\n", "list.csv:1: the label is empty"),
        ("label,youtube_id,time_start,time_end\n,id,0,10\n", "list.csv:2: the label is empty"),
        ("label,youtube_id,time_start,time_end\n-1,id,0,10\n", "list.csv:2: the label must be .*got -1"),
        ("a.mp4\n", "list.csv:1: 'a.mp4' has no label"),
        ("a.mp4 0\nb.mp4\n", "list.csv:2: 'b.mp4' has no label"),
        ("a.mp4 -1\n", "list.csv:1: the label must be a class index from 0 or a class name, got -1"),
        ("first one\na.mp4 0\nb.mp4 1\n", "got 'one' on line 1 and 0 on line 2; delete line 1 if it is a header"),
        ("a.mp4 0\nb.mp4 cat\n", "labels must be all numbers or all class names, got 'cat' on line 2 and 0 on line 1"),
        ("a.mp4,3,4,5\n", "found 4 columns"),
        ("path,size\na.mp4,3\n", "the header has no label column"),
        ("café.mp4 0\n".encode("latin-1"), "list.csv:1: byte 0xe9 is not valid UTF-8; .*iconv -f latin1"),
        ("a.mp4 0\n".encode("utf-16-le"), "list.csv:1: holds a zero byte"),
        (
            "youtube_id,time_start,time_end,split\nid0,0,10,test\n",
            "has no label column .*test server's, cannot be used",
        ),
        ("label,youtube_id,time_start,time_end\nx,id,0:00,0:10\n", "list.csv:2: time_start must be .*got '0:00'"),
        ("label,youtube_id,time_start,time_end\nx,id\n", "list.csv:2: expected 4 columns as in line 1, found 2"),
        ('[{"id": "3"}]', "neither Something-Something's .json .*KeyError: 'template'"),
        ('{"id": {"subset": "test"}}', "neither Something-Something's .json .*'annotations'"),
        ('{"x": {"annotations": {"label": "a", "segment": [0, 1e999]}}}', "OverflowError"),
        ('{"path": "a.mp4", "label": 3}\n{"path": "b.mp4", "label": 0}\n', "neither Something-Something's .json"),
        ("path,label\nb, c.mp4,run\n", "list.csv:2: expected 2 columns as in the header, found 3 .* double quotes"),
        ('{"a class": 3}', "neither Something-Something's .json"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(text, message, write):
    with pytest.raises(ConfigError, match=message):
        read_list(write(text))


def test_hmdb51s_lists_say_what_they_are(write):
    with pytest.raises(ConfigError, match="is HMDB51's list of one class"):
        read_list(write("a.avi 1\nb.avi 2\n", "brush_hair_test_split1.txt"))


@pytest.mark.parametrize(
    "texts, labels, message",
    [
        (["a.mp4 1\nb.mp4 2\n"], None, "labels run from 1 to 2, but class indices start at 0; subtract 1"),
        (["x/a.mp4 1\nx/b.mp4 2\n"], None, "labels run from 1 to 2"),
        (["x/a.mp4 1\ny/b.mp4 2\n", "z/c.mp4\n"], None, "has the folder 'z', whose number the other lists do not tell"),
        (["a.mp4 0\nb.mp4 3\n"], "1 x\n2 y\n3 z\n", "labels must be from 1 to 3 for .*, got 0 to 3"),
    ],
)
def test_numbers_that_are_not_class_indices(texts, labels, message, write):
    files = [write(text, f"{number}.txt") for number, text in enumerate(texts)]
    with pytest.raises(ConfigError, match=message):
        indices(*files, labels=labels and write(labels, "labels"))


def test_what_a_known_data_set_lacks_is_refused(write):
    with pytest.raises(ConfigError, match=r"the data set k400 has no class 'zumbaa' \(nearest: zumba"):
        indices(write("a.mp4 zumbaa\n"), dataset="k400")
    with pytest.raises(ConfigError, match="labels must be from 0 to 173 for the data set ssv2, got 3 to 174"):
        indices(write("a.mp4 174\nb.mp4 3\n"), dataset="ssv2")
    other = write('{"zumba": 0, "abseiling": 1}', "labels.json")
    with pytest.raises(ConfigError, match="gives 'zumba' the number 0, but in k400 it is 399"):
        indices(write("a.mp4 zumba\n"), labels=other, dataset="k400")


def test_classes_that_differ_only_in_case_are_refused(write):
    with pytest.raises(ConfigError, match="the classes 'Ant' and 'ant' differ only in case"):
        indices(write("a.mp4 Ant\nb.mp4 ant\n"))
    assert indices(write("a.mp4 Zumba\nb.mp4 zumba\n"), dataset="k400") == [399, 399]


def test_numbers_with_gaps_stay_as_they_are(write):
    assert indices(write("a.mp4 7\nwith a space.mp4 3\n")) == [7, 3]
    assert indices(write("a.mp4 ²\nb.mp4 x\n")) == [1, 0]  # a name: no integer is written like that
    assert indices(write("a.mp4 1.0\nb.mp4 0.0\n")) == [1, 0]  # as pandas writes integers
