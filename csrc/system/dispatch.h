// Which instruction set runs: the best one of this CPU, or the one that was forced.
#pragma once
#include <string>
#include <vector>

#include "system/table.h"

namespace bitfold {

// The table in use. The best one of the CPU until set_isa says otherwise.
const Table& table();

// Names of the instruction sets compiled in and supported by this CPU, best last.
std::vector<std::string> isas();

// Makes `name` the one in use ("" = the best); false if this build or this CPU lacks it.
bool set_isa(const std::string& name);

// For tests: makes a table of the caller's the one in use.
void set_table(const Table* t);

}  // namespace bitfold
