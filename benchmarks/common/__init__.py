"""What every suite shares: the machine's name, the clock, peak memory, results files, tables and plots."""
