namespace KRONBLOCKS_ISA { int placeholder() { int sum = 0;
#pragma omp parallel reduction(+ : sum)
  sum += 1;
  return sum; } }
