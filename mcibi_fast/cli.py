"""``mcibi-fast``: the command line.  Each command's work is in `mcibi_fast.commands`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

EPILOG = """\
examples:
  mcibi-fast demo
  mcibi-fast train camvid --root DATA/camvid --set optimizer.lr=0.02 epochs=50
  mcibi-fast evaluate runs/camvid --split test
  mcibi-fast data check ade20k DATA/ADEChallengeData2016.zip

MCIBI_FAST_DEBUG=1 in the environment shows the traceback of an error."""


class Parser(argparse.ArgumentParser):
    """Bad usage is one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments; light to import."""
    parser = Parser(
        prog="mcibi-fast",
        description="MCIBI++ for semantic segmentation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_video(commands)
    _add_report(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_data(commands)
    _add_demo(commands)
    _add_ablate(commands)
    bench = _add(commands, "bench", "bench", "run the benchmarks, or plot their results")
    bench.add_argument("name", nargs="?", help="a benchmark, all, or plot; without it: the list")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on, such as --quick")
    _add(commands, "info", "info", "say what was built, which backends are live, and why not")
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, module: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(module=module)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "train", "train", "train a model and evaluate it")
    parser.add_argument(
        "recipe", nargs="?", help="demo, scenes, camvid, folder, or a dataset: ade20k, ..."
    )
    parser.add_argument("--root", metavar="DIR", help="the dataset's folder, zip file or shards")
    parser.add_argument(
        "--framework", metavar="NAME", help="fcn, pspnet, upernet, deeplabv3, isnet"
    )
    parser.add_argument("--backbone", metavar="NAME", help="a model of timm, such as resnet101")
    parser.add_argument("--memory", metavar="NAME", help="mcibipp (the default), mcibi, or none")
    parser.add_argument("--without-memory", action="store_true", help="the same as --memory none")
    parser.add_argument("--out", metavar="DIR", help="the run's directory (default: runs/RECIPE)")
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in DIR")
    _add_set(parser, "change any field of the recipe, such as optimizer.lr=0.02")
    parser.add_argument("--show", action="store_true", help="print all fields and stop")
    _add_quiet(parser)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "evaluate", "evaluate", "score a checkpoint on a split")
    parser.usage = "%(prog)s [options] CHECKPOINT"
    parser.add_argument("checkpoint", help="a run's directory or a .safetensors file")
    parser.add_argument("--dataset", metavar="NAME", help="another one than the run's: cihp, ...")
    parser.add_argument("--root", metavar="DIR", help="dataset folder (default: the run's data)")
    parser.add_argument("--split", help="default: the run's validation split")
    _add_inference(parser)
    parser.add_argument("--fold", action="store_true", help="fold batch norms and memory first")
    parser.add_argument("--without-class", metavar="K,...", help="also the means without these")
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        choices=("vspw2021", "strict"),
        help="videos: vspw2021 (default), strict",
    )
    parser.add_argument("--flow", metavar="F", help="videos: TC's; dis, raft, its weights, none")
    parser.add_argument("--json", metavar="FILE", help="write the scores there, too")
    parser.add_argument("--batch-size", metavar="B", type=int, default=1, help="of equal images")
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="loader processes")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    _add_quiet(parser)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "predict", "predict", "write label maps and overlays of images")
    parser.usage = "%(prog)s [options] CHECKPOINT SOURCE"
    parser.add_argument("checkpoint", help="a run's directory or a .safetensors file")
    parser.add_argument("source", help="an image, or a folder of images")
    parser.add_argument("--out", metavar="DIR", default="predictions", help="default: predictions")
    _add_inference(parser)
    parser.add_argument("--own-size", action="store_true", help="not the run's test size")
    parser.add_argument(
        "--submission",
        metavar="NAME",
        nargs="?",
        const="",
        help="also for a test server: cityscapes, ade20k, ... (default: the run's)",
    )
    parser.add_argument("--no-overlays", action="store_true", help="label maps only")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    _add_quiet(parser)


def _add_video(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "video", "video", "write label maps and an overlay of a video")
    parser.usage = "%(prog)s [options] CHECKPOINT SOURCE"
    parser.add_argument("checkpoint", help="a run's directory or a .safetensors file, of any model")
    parser.add_argument("source", help="a video file, a folder of frames, or a camera's number")
    parser.add_argument("--out", metavar="DIR", default="video", help="default: video")
    parser.add_argument("--no-overlay", action="store_true", help="label maps only")
    parser.add_argument("--every", metavar="N", type=int, default=1, help="one frame of so many")
    parser.add_argument("--limit", metavar="N", type=int, help="end after so many frames")
    _add_inference(parser)
    parser.add_argument("--own-size", action="store_true", help="not the run's test size")
    parser.add_argument("--fold", action="store_true", help="fold batch norms and memory first")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    _add_quiet(parser)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands, "report", "report", "write a page with the pictures of one or more runs"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs to compare")
    parser.add_argument("--root", metavar="DIR", help="dataset folder (default: the run's data)")
    parser.add_argument("--images", type=int, default=6, help="how many to show (default: 6)")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first run")
    parser.add_argument("--gallery", metavar="DIR", help="write each picture as a PNG there, too")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    _add_quiet(parser)


def _add_inference(parser: argparse.ArgumentParser) -> None:
    """Changes to the run's own settings; texts are read by `commands.run_settings`."""
    parser.add_argument("--scales", metavar="S,...", help="such as 0.5,0.75,1 (default: the run's)")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirrored views, too")
    parser.add_argument("--window", metavar="H,W", help="sliding windows; none: whole image")
    parser.add_argument("--stride", metavar="H,W", help="default: 2/3 of the window")
    parser.add_argument(
        "--softmax", choices=["labels", "stride"], help="at which size, before averaging"
    )
    parser.add_argument("--stages", metavar="N", type=int, help="of iterative inference")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "convert", "convert", "make a weights file of a released checkpoint")
    parser.add_argument("checkpoint", help="a file of the authors' released code (sssegmentation)")
    parser.add_argument("out", help="the .safetensors file to write")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--classes", metavar="A,B,...", help="class names (default: class_0, ...)")
    classes.add_argument("--dataset", metavar="NAME", help="names and colours of ade20k, lip, ...")
    parser.add_argument(
        "--weights-from",
        choices=["auto", "pr", "cwi"],
        default="auto",
        help="the head that gathers; pr for ppm_resnet50os8_ade20k, auto for all others",
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "export", "export", "make an ONNX or torch.export file of a checkpoint")
    parser.add_argument("checkpoint", help="a run's directory or a .safetensors file")
    parser.add_argument("out", help="the .onnx or .pt2 file to write")
    parser.add_argument("--size", metavar="H,W", help="of the images, then fixed (default: any)")
    parser.add_argument("--stages", type=int, metavar="N", help="of iterative inference")
    parser.add_argument("--no-fold", action="store_true", help="keep batch norms and projections")
    parser.add_argument(
        "--check", metavar="IMAGE", help="compare on this image, too (default: random numbers)"
    )


def _add_data(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "data", "data", "look after datasets")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = _add(actions, "check", "data", "read a dataset and report what is wrong with it")
    check.usage = "%(prog)s [options] [NAME] ROOT"
    check.set_defaults(action="check")
    check.add_argument(
        "dataset",
        nargs="+",
        metavar="[NAME] ROOT",
        help="ROOT alone holds images/SPLIT and labels/SPLIT; a published dataset by its name "
        "(ade20k, lip, cihp, cityscapes, coco_stuff, pascal_context, voc, vspw, camvid), also "
        "zipped",
    )
    check.add_argument("--out", metavar="DIR", help="where four overlays go (default: data_check)")
    check.add_argument("--classes", metavar="A,B,...", help="class names, or 'camvid'")
    _add_quiet(check)
    convert = _add(actions, "convert", "data", "make PASCAL-Context's masks from its annotations")
    convert.set_defaults(action="convert")
    convert.add_argument("name", choices=["pascal_context"], help="the dataset")
    convert.add_argument("root", help="VOC2010, or the folder that holds it")
    convert.add_argument("--annotations", metavar="FILE", help="trainval_merged.json")
    _add_quiet(convert)
    _add_pack(actions)


def _add_pack(actions: argparse._SubParsersAction) -> None:
    pack = _add(actions, "pack", "data", "write a dataset into tar shards, for `train --root OUT`")
    pack.usage = "%(prog)s [options] [NAME] ROOT OUT"
    pack.set_defaults(action="pack")
    pack.add_argument(
        "dataset",
        nargs="+",
        metavar="[NAME] ROOT OUT",
        help="a folder, or a published dataset by its name, as for check; shards go to OUT/SPLIT",
    )
    pack.add_argument(
        "--split",
        nargs="+",
        action="extend",
        metavar="SPLIT",
        help="splits to pack (default: train val)",
    )
    pack.add_argument("--shard-size", type=int, default=256, metavar="MB", help="default: 256")
    pack.add_argument("--classes", metavar="A,B,...", help="class names, or 'camvid'")
    pack.add_argument("--workers", type=int, default=2, help="processes that read (default: 2)")
    _add_quiet(pack)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "demo", "demo", "train FCN with and without MCIBI++ and compare them")
    parser.add_argument("--out", metavar="DIR", default="runs/demo", help="default: runs/demo")
    parser.add_argument("--seeds", type=int, default=1, help="runs per model (default: 1)")
    _add_set(parser, "change a field of the recipe, for both models")
    _add_quiet(parser)


def _add_ablate(commands: argparse._SubParsersAction) -> None:
    text = "train the rows of one of the paper's tables and compare"
    parser = _add(commands, "ablate", "ablate", text)
    parser.add_argument("table", nargs="?", help="such as 2; without it: the list")
    parser.add_argument(
        "--data", help="camvid, ade20k, ... (default: scenes, of videos moving_scenes)"
    )
    parser.add_argument("--root", metavar="DIR", help="the dataset's folder, or its zip file")
    parser.add_argument("--test-root", metavar="DIR", help="table 8: the folder of CIHP")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="all runs, which tables share (default: runs/ablate/DATA); what is done is kept",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs per row (default: 1)")
    parser.add_argument("--rows", metavar="A,B", help="names or numbers (default: all)")
    _add_set(parser, "change a field of the recipe, for all rows")
    _add_quiet(parser)


def _add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", nargs="+", action="extend", default=[], help=text
    )


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 2 after bad input, which is one line on stderr; 130 after Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
        command = importlib.import_module(f"mcibi_fast.commands.{args.module}")
        return command.run(args) or 0
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted")
        return 130
    except Exception as error:
        if os.environ.get("MCIBI_FAST_DEBUG") == "1" or not _is_expected(error):
            raise
        _complain(f"error: {_one_line(error)}")
        return 2


def _is_expected(error: Exception) -> bool:
    """Bad input, as against a bug, whose traceback is wanted."""
    from mcibi_fast.training.errors import TrainingError

    return isinstance(error, (ValueError, OSError, TrainingError))


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split())


def _complain(message: str) -> None:
    rank = os.environ.get("RANK")
    print(f"mcibi-fast{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
