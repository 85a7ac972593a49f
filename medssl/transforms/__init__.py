"""What happens to voxels: grids and preprocessing here, views and mixing beside them."""
