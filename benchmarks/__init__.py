"""The attack lab: data, networks, attacks and a zoo of models whose backdoors are known and measured."""
