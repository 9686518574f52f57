"""FastRM: ``python -m benchmarks fastrm``. A head that is compared is one entry of `heads.ABLATIONS`."""
