# The target steelyard::mpi: the library and MPI. Used by the build tree and by the installed package.
# STEELYARD_HAS_MPI is for programs that can run with and without MPI; no header of the library reads it.
add_library(steelyard_mpi INTERFACE)
add_library(steelyard::mpi ALIAS steelyard_mpi)
target_link_libraries(steelyard_mpi INTERFACE steelyard::steelyard MPI::MPI_CXX)
target_compile_definitions(steelyard_mpi INTERFACE STEELYARD_HAS_MPI=1)
