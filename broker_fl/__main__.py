from broker_fl.cli.main import main

if __name__ == "__main__":
    main()
