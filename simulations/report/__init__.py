"""Tables and figures of studies: :func:`.study.write_report` draws what a folder holds."""
