// Proves that logits are the same bits whatever computes them: instruction sets, threads, batches, chunks, page orders,
// skipping or not. Prints a line `name hash` for each configuration and exits 1 when something differs.
//
//     autoglm-selftest [--isa NAME]... [--quick]
//
// Without --isa all instruction sets of this CPU are run and compared; the lines are then printed once.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "models.h"

namespace selftest {
namespace {

using namespace autoglm;

struct Line {
  std::string name;
  uint64_t hash;
};

struct Work {
  std::vector<std::vector<int32_t>> sequences;
  std::vector<int> prompts;
  std::vector<Schedule> schedules;
};

// Prompts of many lengths, each followed by a few tokens one at a time.
Work work_for(const Config& config, bool quick) {
  Work work;
  Random random(21);
  std::vector<int> prompts = {40, 3, 17};
  if (!quick) prompts = {520, 40, 3, 33, 17, 16, 1, 7, 2, 5, 9, 31, 11, 8, 4, 1, 1};
  for (int prompt : prompts) {
    work.prompts.push_back(prompt);
    work.sequences.emplace_back();
    for (int i = 0; i < prompt + (quick ? 3 : 5); ++i) work.sequences.back().push_back(random.below(config.vocab));
  }
  // The first is what the others must equal.
  work.schedules = {{1, 1, 64, false, 1}};
  if (quick) {
    work.schedules.push_back({2, 3, 7, true, 0});
    work.schedules.push_back({1, 3, 1, true, 1});
  } else {
    for (const Schedule& s : {Schedule{1, 1, 1, true, 0}, {2, 3, 7, true, 0}, {4, 8, 64, true, 1}, {2, 17, 512, true, 1}, {2, 17, 7, false, 0.7}})
      work.schedules.push_back(s);
  }
  return work;
}

uint64_t run_config(const Config& config, const Kernels* kernels, bool quick, int* wrong) {
  const Work work = work_for(config, quick);
  const Weights weights(config);
  Block<float> first;
  Hash hash;
  for (const Schedule& schedule : work.schedules) {
    Block<float> logits = logits_of(weights, config, kernels, work.sequences, work.prompts, schedule);
    if (!first.get()) {
      hash.add(logits.get(), logits.bytes());
      first = std::move(logits);
      for (size_t i = 0; i < first.size(); ++i)
        if (!(first[i] > -1e6f && first[i] < 1e6f)) {
          ++*wrong;
          std::fprintf(stderr, "%s: %s: logit %zu is %g\n", config.name, kernels->name, i, double(first[i]));
          break;
        }
      continue;
    }
    if (std::memcmp(first.get(), logits.get(), first.bytes()) == 0) continue;
    ++*wrong;
    size_t at = 0;
    while (std::memcmp(&first[at], &logits[at], 4) == 0) ++at;
    std::fprintf(stderr, "%s: %s: (%s) differs from (%s) at token %zu, logit %zu: %.9g, not %.9g\n", config.name, kernels->name,
                 described(schedule).c_str(), described(work.schedules[0]).c_str(), at / size_t(config.vocab),
                 at % size_t(config.vocab), double(logits[at]), double(first[at]));
  }
  return hash.value();
}

std::vector<Line> run_all(const Kernels* kernels, bool quick, bool print, int* wrong) {
  std::vector<Line> lines;
  const auto add = [&](const char* name, uint64_t hash) {
    lines.push_back({name, hash});
    if (print) std::printf("%-22s %016" PRIx64 "\n", name, hash);
    std::fflush(stdout);
  };
  add("kernels", kernels_hash(kernels, kernels_for(Isa::portable), quick, wrong));
  add("sampler", sampler_hash(kernels, quick, wrong));
  for (const Config& config : configs()) add(config.name, run_config(config, kernels, quick, wrong));
  return lines;
}

int usage(const char* problem) {
  std::fprintf(stderr, "%s\nusage: autoglm-selftest [--isa portable|avx2|avx512|amx|neon]... [--quick]\n", problem);
  return 2;
}

}  // namespace
}  // namespace selftest

int main(int count, char** arguments) {
  using namespace selftest;
  bool quick = false;
  std::vector<const Kernels*> chosen;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--quick") == 0) { quick = true; continue; }
    if (std::strcmp(arguments[i], "--isa") != 0 || i + 1 == count) return usage("an argument is not known");
    const char* error = nullptr;
    chosen.push_back(choose(arguments[++i], &error));
    if (!chosen.back()) { std::fprintf(stderr, "%s: %s\n", arguments[i], error); return 2; }
  }
  if (chosen.empty())
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx, Isa::neon})
      if (const Kernels* kernels = kernels_for(isa)) chosen.push_back(kernels);
  int wrong = 0;
  std::vector<Line> first;
  for (const Kernels* kernels : chosen) {
    std::fprintf(stderr, "running %s\n", kernels->name);
    const std::vector<Line> lines = run_all(kernels, quick, first.empty(), &wrong);
    if (first.empty()) { first = lines; continue; }
    for (size_t i = 0; i < lines.size(); ++i) {
      if (lines[i].hash == first[i].hash) continue;
      ++wrong;
      std::fprintf(stderr, "%s: %s gives %016" PRIx64 ", %s gave %016" PRIx64 "\n", lines[i].name.c_str(), kernels->name,
                   lines[i].hash, chosen[0]->name, first[i].hash);
    }
  }
  if (wrong) { std::fprintf(stderr, "%d differences\n", wrong); return 1; }
  return 0;
}
