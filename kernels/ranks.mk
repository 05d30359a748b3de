# ranks.mk: a model cut over processes: what they talk through.
#
## mpirun -n 2 ./run     after make DIST=mpi: a model cut over processes on one machine or several (docs/ranks.md)

DIST ?= none
values_DIST := none mpi
ifeq ($(DIST)-$(DEVICE),mpi-cuda)
$(error DIST=mpi with DEVICE=cuda: the ranks gather in the CPU's memory: DEVICE=cpu, or DIST=none)
endif

# Open MPI where there is no mpicxx of another one (MPICH, a cluster's own); both say with -show what they add to g++.
MPI_PACKAGES = $(if $(filter mpi,$(DIST)),$(if $(shell command -v mpicxx),,openmpi-bin libopenmpi-dev))
MPI_FLAGS = $(shell mpicxx -show)
%/ranks_mpi.o: private CXXFLAGS += $(patsubst -I%,-isystem %,$(filter -I%,$(MPI_FLAGS)))
MPI_LIBS = $(if $(filter mpi,$(DIST)),$(filter -L% -l% -Wl%,$(MPI_FLAGS)))
