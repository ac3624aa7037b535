from sb3_adaptive_kl.zoo.launcher import main

if __name__ == "__main__":
    main()
