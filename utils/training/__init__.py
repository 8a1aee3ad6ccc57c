"""What training needs beside a method: optimizer groups, devices and precision, several processes."""
