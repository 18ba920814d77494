from sigma_lite.cli import main

main()
