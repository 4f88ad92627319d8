"""What may stand in a block's slot: Mamba's rivals, one file each; ``registry`` knows them by their letters."""
