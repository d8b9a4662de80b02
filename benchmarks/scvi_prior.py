"""Cells by scVI's prior, to stand in one table with those of a run: the same genes, the same training cells.

    pip install scvi-tools
    python benchmarks/scvi_prior.py --dataset_name pbmc.h5ad --vae runs/pbmc/vae --output_dir runs/scvi
    python evaluate.py --modality expression --samples runs/scvi --reference pbmc.h5ad --split_of runs/pbmc/vae \\
        --label_column cell_type

scVI (Lopez et al. 2018) is trained with its own defaults; latents come from its standard normal prior, library sizes
from training cells, and counts are drawn from its likelihood. It makes no labels.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="The .h5ad file that --vae was trained on.")
    parser.add_argument("--counts_layer", default=None, help="Layer with the raw counts. Default: X.")
    parser.add_argument("--vae", required=True, help="A run of train_expression_vae.py: its genes and its split.")
    parser.add_argument("--num_samples", type=int, default=1000, help="Cells to make.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of training and samples.")
    parser.add_argument("--output_dir", required=True, help="Where cells.h5ad goes.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import anndata
    import numpy as np
    import pandas as pd
    import scvi
    import torch

    from utils.expression.codec import load_expression_vae, rows_of_split
    from utils.expression.data.source import open_cells
    from utils.expression.data.table import read_table
    from utils.expression.files import save_cells

    source = open_cells(args.dataset_name, args.counts_layer)
    vae = load_expression_vae(args.vae)
    table = read_table(source, rows_of_split(source, args.vae, "train", "--vae"), vae.config.genes)
    adata = anndata.AnnData(
        table.counts.copy(), pd.DataFrame(index=table.cell_ids.astype(object)), pd.DataFrame(index=table.genes)
    )
    scvi.settings.seed = args.seed
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata)
    started = time.perf_counter()
    model.train(accelerator="auto", enable_progress_bar=False)
    print(f"trained in {time.perf_counter() - started:.0f} s, {len(model.history['elbo_train'])} epochs")

    rng = np.random.default_rng(args.seed)
    library = np.log(table.library_sizes[rng.integers(len(table), size=args.num_samples)])
    module = model.module.cpu().eval()
    torch.manual_seed(args.seed)
    with torch.no_grad():
        latents = torch.randn(args.num_samples, module.n_latent)
        batch_index = torch.zeros(args.num_samples, 1)
        generated = module.generative(latents, torch.from_numpy(library).float()[:, None], batch_index)
        counts = generated["px"].sample().numpy().astype(np.float32)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {"model": f"scVI {scvi.__version__}, its prior"}
    save_cells(output_dir, counts, np.exp(library), table.genes, [{}] * len(counts), settings=settings, seed=args.seed)
    print(f"{len(counts)} cells in {output_dir}")


if __name__ == "__main__":
    main()
