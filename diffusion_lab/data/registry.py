r"""Built-in image sources, and opening of a source by its address."""

__all__ = ["FILE_SOURCES", "GENERATED_SOURCES", "open_source"]

from collections.abc import Mapping

from diffusion_lab.data.faces_source import FacesSource
from diffusion_lab.data.folder_source import FolderSource
from diffusion_lab.data.parquet_source import ParquetSource
from diffusion_lab.data.source import Source, SourceOptions
from diffusion_lab.errors import DataError

# Sources without files, by address; they are cheap to open.
GENERATED_SOURCES: dict[str, type[Source]] = {"faces": FacesSource}
# The first one that accepts the files at an address opens them.
FILE_SOURCES: tuple[type[Source], ...] = (ParquetSource, FolderSource)


def open_source(
    source: str,
    size: int,
    splits: Mapping[str, float],
    seed: int = 0,
    image_column: str = "image",
    download: bool = True,
    link_root: str | None = None,
) -> Source:
    """Opens the source at an address.

    Arguments:
        source: "faces"; a folder of images or of parquet files, local, on S3
            (s3://<bucket>/<folder>) or on Google Cloud (gs://...); a parquet file; or
            "hf://datasets/<owner>/<name>[@<revision>]" for a dataset of the Hugging Face Hub.
        size: Height and width of the images in pixels.
        splits: The number of images of each split, for faces.
        seed: Seed of the drawings, for faces.
        image_column: The column of images in parquet files.
        download: See `open_storage`.
        link_root: See `open_storage`.

    Raises:
        DataError: If there is nothing at the address, or it cannot be reached.
    """
    options = SourceOptions(source, size, splits, seed, image_column, download, link_root)
    generated = GENERATED_SOURCES.get(source)
    for kind in FILE_SOURCES if generated is None else (generated,):
        if (opened := kind.open(options)) is not None:
            return opened
    raise DataError(f"data.source={source} holds no images of a supported format")
